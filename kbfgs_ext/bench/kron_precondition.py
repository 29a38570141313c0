"""kron_precondition: arguments, and the direction from BLAS calls."""

from __future__ import annotations

import torch
from torch import Tensor

from kbfgs_ext.bench.kernel import Arguments, Kernel, Layers, Numbers

STEP_SIZE = 1e-3  # so small that repeated steps leave the weights in the range of normal numbers


def _matrices(layers: Layers, make: Numbers) -> list[Tensor]:
    return [make.normal(x.n_g, x.n_a) for x in layers]


def _unset(layers: Layers, make: Numbers) -> list[Tensor]:
    return [make.unset(x.n_g, x.n_a) for x in layers]


def _parameters(layers: Layers, make: Numbers, W: str = "W", b: str = "b") -> Arguments:
    return {
        W: [make.normal(x.d_out, x.d_in) for x in layers],
        b: [make.normal(x.d_out if x.bias else 0) for x in layers],
    }


def _gradient(layers: Layers, make: Numbers) -> Arguments:
    return _parameters(layers, make, "dW", "db")


def _step_sizes(layers: Layers, make: Numbers) -> list[Tensor]:
    return [make.scalar(STEP_SIZE) for _ in layers]


def _direction(layers: Layers, make: Numbers) -> Arguments:
    H_g, H_a = [make.spd(x.n_g) for x in layers], [make.spd(x.n_a) for x in layers]
    P, M, work = _unset(layers, make), _matrices(layers, make), _unset(layers, make)
    return dict(P=P, H_g=H_g, M=M, H_a=H_a, work=work)


def _direction_blas(P: list, H_g: list, M: list, H_a: list, work: list) -> None:
    for i in range(len(P)):
        torch.mm(H_g[i], M[i], out=work[i])
        torch.mm(work[i], H_a[i], out=P[i])


def _momentum(layers: Layers, make: Numbers) -> Arguments:
    numbers = dict(M=_matrices(layers, make), momentum=0.9, weight_decay=1e-5, ok=None)
    return _gradient(layers, make) | _parameters(layers, make) | numbers


def _descend(layers: Layers, make: Numbers) -> Arguments:
    P, step_size = _matrices(layers, make), _step_sizes(layers, make)
    return _parameters(layers, make) | dict(P=P, step_size=step_size, ok=None)


def _slope(layers: Layers, make: Numbers) -> Arguments:
    slope, saved = [make.unset(x.n_g) for x in layers], _matrices(layers, make)
    step = _parameters(layers, make) | _gradient(layers, make)
    return step | dict(slope=slope, saved=saved)


def _output_change(layers: Layers, make: Numbers) -> Arguments:
    change, saved = [make.unset(x.n_g) for x in layers], _matrices(layers, make)
    a_bar, a_next = ([make.normal(x.n_a) for x in layers] for _ in range(2))
    means = dict(a_bar=a_bar, a_bar_next=a_next)
    return _parameters(layers, make) | means | dict(change=change, saved=saved)


def _lengths(layers: Layers, make: Numbers) -> Arguments:
    roots = [torch.stack([make.scalar(x.n_g**0.5) for x in layers])]
    return dict(
        sizes=[torch.full_like(roots[0], float("nan"))], norms=[roots[0].float()], roots=roots,
        step_size=[make.scalar(STEP_SIZE)], shared=True,
    )  # fmt: skip


def _restore(layers: Layers, make: Numbers) -> Arguments:
    saved, undo = _matrices(layers, make), torch.tensor(True, device=make.device)
    return _parameters(layers, make) | dict(saved=saved, undo=undo)


def _step(layers: Layers, make: Numbers) -> Arguments:
    step_size = _step_sizes(layers, make)
    return _direction(layers, make) | _momentum(layers, make) | dict(step_size=step_size)


KERNELS = (
    Kernel("kron_precondition_", "kron_precondition_", _direction, _direction_blas),
    Kernel("kron_step_", "kron_step_", _step),
    Kernel("momentum_", "momentum_", _momentum),
    Kernel("descend_", "descend_", _descend),
    Kernel("slope_", "slope_", _slope),
    Kernel("output_change_", "output_change_", _output_change),
    Kernel("restore_", "restore_", _restore),
    Kernel("lengths_", "lengths_", _lengths),
)
