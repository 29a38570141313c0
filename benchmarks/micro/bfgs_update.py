"""bfgs_update: arguments, and the gated update from BLAS calls."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.micro.kernel import Kernel, Layers, Numbers
from kbfgs_ext.ops.bfgs_update.api import workspace_size


def _update(layers: Layers, make: Numbers) -> list[Any]:
    """Both factors of every layer."""
    H = [make.spd(n) for x in layers for n in (x.n_a, x.n_g)]
    s, y = (list(column) for column in zip(*(make.pair(h) for h in H), strict=True))
    return [H, [make.counts() for _ in H], s, y, [], [make.vector(len(h)) for h in H], None]


def _update_blas(H: list, counts: list, s: list, y: list, Hy: list, c: list, ok: None) -> None:
    for H_i, counts_i, s_i, y_i, c_i in zip(H, counts, s, y, c, strict=True):
        Hy_i = H_i @ y_i
        sy, ss, yHy = s_i @ y_i, s_i @ s_i, y_i @ Hy_i
        accept = (sy > 0) & (sy > 1e-4 * ss * c_i.norm()) & (yHy >= 0)
        accept &= torch.isfinite(ss * yHy / sy)
        rho = 1 / sy
        w = (rho * rho * yHy + rho) / 2 * s_i - rho * Hy_i
        w = torch.where(accept, w, 0)
        H_i.addmm_(torch.stack((s_i, w), 1), torch.stack((w, s_i)))
        counts_i[0] += accept
        counts_i[1] += ~accept


def _curvature(layers: Layers, make: Numbers, from_X: bool) -> list[Any]:
    H_a, H_g = [make.spd(x.n_a) for x in layers], [make.spd(x.n_g) for x in layers]
    s, y = (list(column) for column in zip(*(make.pair(h) for h in H_g), strict=True))
    h_bar, g_bar = ([make.vector(len(h)) for h in H_g] for _ in range(2))
    h_next = [h + v for h, v in zip(h_bar, s, strict=True)]  # the averages stay where they are
    g_next = [g + v for g, v in zip(g_bar, y, strict=True)]
    work = [make.unset(workspace_size(x.n_a, x.n_g)) for x in layers]
    A = [] if from_X else [make.spd(x.n_a) for x in layers]
    X = [make.normal(make.batch, x.d_in) for x in layers] if from_X else []
    return [
        H_a, H_g, s, y, [make.counts() for _ in layers], [make.counts() for _ in layers], work, A,
        X, [make.vector(x.n_a) for x in layers], h_bar, h_next, g_bar, g_next,
        [make.scalar(0.3) for _ in layers], [make.scalar(0.55) for _ in layers], 0.9, 0.2, None,
        None,
    ]  # fmt: skip


def _restart(layers: Layers, make: Numbers) -> list[Any]:
    """Of a step that restarts nothing."""
    H, A = [make.spd(x.n_a) for x in layers], [make.spd(x.n_a) for x in layers]
    marks, counts = ([make.counts()[:k] + 20 for _ in layers] for k in (3, 4))
    return [H, [], marks, counts, [make.scalar(0.3) for _ in layers], A, [], 10, None]


_ema = functools.partial(_curvature, from_X=False)
_minibatch = functools.partial(_curvature, from_X=True)

KERNELS = (
    Kernel("bfgs_update_", "bfgs_update_", _update, _update_blas),
    Kernel("curvature_update_, ema", "curvature_update_", _ema),
    Kernel("curvature_update_, minibatch", "curvature_update_", _minibatch),
    Kernel("restart_", "restart_", _restart),
)
