"""kron_precondition: arguments, and the direction from BLAS calls."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.micro.kernel import Kernel, Layers, Numbers

STEP_SIZE = 1e-3  # so small that repeated steps leave the weights in the range of normal numbers


def _matrices(layers: Layers, make: Numbers) -> list[Any]:
    return [make.normal(x.n_g, x.n_a) for x in layers]


def _unset(layers: Layers, make: Numbers) -> list[Any]:
    return [make.unset(x.n_g, x.n_a) for x in layers]


def _parameters(layers: Layers, make: Numbers) -> list[Any]:
    """W, b"""
    W = [make.normal(x.d_out, x.d_in) for x in layers]
    return [W, [make.normal(x.d_out if x.bias else 0) for x in layers]]


def _factors(layers: Layers, make: Numbers) -> list[Any]:
    """H_g, H_a"""
    return [[make.spd(x.n_g) for x in layers], [make.spd(x.n_a) for x in layers]]


def _step_sizes(layers: Layers, make: Numbers) -> list[Any]:
    return [make.scalar(STEP_SIZE) for _ in layers]


def _direction(layers: Layers, make: Numbers) -> list[Any]:
    H_g, H_a = _factors(layers, make)
    return [_unset(layers, make), H_g, _matrices(layers, make), H_a, _unset(layers, make)]


def _direction_blas(P: list, H_g: list, M: list, H_a: list, work: list) -> None:
    for i in range(len(P)):
        torch.mm(H_g[i], M[i], out=work[i])
        torch.mm(work[i], H_a[i], out=P[i])


def _momentum(layers: Layers, make: Numbers) -> list[Any]:
    gradient, parameters = _parameters(layers, make), _parameters(layers, make)
    return [_matrices(layers, make), *gradient, *parameters, 0.9, 1e-5, None]


def _descend(layers: Layers, make: Numbers) -> list[Any]:
    P = _matrices(layers, make)
    return [*_parameters(layers, make), P, _step_sizes(layers, make), None]


def _slope(layers: Layers, make: Numbers) -> list[Any]:
    out = [make.unset(x.n_g) for x in layers]
    return [out, *_parameters(layers, make), _matrices(layers, make), *_parameters(layers, make)]


def _output_change(layers: Layers, make: Numbers) -> list[Any]:
    out = [make.unset(x.n_g) for x in layers]
    a_bar, a_bar_next = ([make.normal(x.n_a) for x in layers] for _ in range(2))
    return [out, *_parameters(layers, make), _matrices(layers, make), a_bar, a_bar_next]


def _restore(layers: Layers, make: Numbers) -> list[Any]:
    saved, undo = _matrices(layers, make), torch.tensor(True, device=make.device)
    return [*_parameters(layers, make), saved, undo]


def _step(layers: Layers, make: Numbers) -> list[Any]:
    H_g, H_a = _factors(layers, make)
    return [
        *_parameters(layers, make), _matrices(layers, make), _unset(layers, make),
        _unset(layers, make), *_parameters(layers, make), H_g, H_a, _step_sizes(layers, make),
        0.9, 1e-5, None,
    ]  # fmt: skip


KERNELS = (
    Kernel("kron_precondition_", "kron_precondition_", _direction, _direction_blas),
    Kernel("kron_step_", "kron_step_", _step),
    Kernel("momentum_", "momentum_", _momentum),
    Kernel("descend_", "descend_", _descend),
    Kernel("slope_", "slope_", _slope),
    Kernel("output_change_", "output_change_", _output_change),
    Kernel("restore_", "restore_", _restore),
)
