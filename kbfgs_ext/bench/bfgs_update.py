"""bfgs_update: arguments, and the gated update from BLAS calls."""

from __future__ import annotations

import functools

import torch

from kbfgs_ext.bench.kernel import Arguments, Kernel, Layers, Numbers
from kbfgs_ext.ops.bfgs_update.api import workspace_size


def _update(layers: Layers, make: Numbers) -> Arguments:
    """Both factors of every layer."""
    H = [make.spd(n) for x in layers for n in (x.n_a, x.n_g)]
    s, y = (list(column) for column in zip(*(make.pair(h) for h in H), strict=True))
    counts, c = [make.counts() for _ in H], [make.vector(len(h)) for h in H]
    return dict(H=H, counts=counts, s=s, y=y, Hy=[], c=c, ok=None)


def _update_blas(H: list, counts: list, s: list, y: list, c: list) -> None:
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


def _curvature(layers: Layers, make: Numbers, from_X: bool) -> Arguments:
    H_a, H_g = [make.spd(x.n_a) for x in layers], [make.spd(x.n_g) for x in layers]
    s, y = (list(column) for column in zip(*(make.pair(h) for h in H_g), strict=True))
    g_bar = [make.vector(len(h)) for h in H_g]
    h_change = [v.clone() for v in s]  # the averages stay where they are
    g_next = [g + v for g, v in zip(g_bar, y, strict=True)]
    work = [make.unset(workspace_size(x.n_a, x.n_g)) for x in layers]
    A = [] if from_X else [make.spd(x.n_a) for x in layers]
    X = [make.normal(make.batch, x.d_in) for x in layers] if from_X else []
    return dict(
        H_a=H_a, H_g=H_g, s=s, y=y, counts_a=[make.counts() for _ in layers],
        counts_g=[make.counts() for _ in layers], work=work, A=A, X=X,
        a_bar=[make.vector(x.n_a) for x in layers], h_change=h_change, g_bar=g_bar,
        g_bar_next=g_next, lam_a=[make.scalar(0.3) for _ in layers],
        lam_g=[make.scalar(0.55) for _ in layers], pair_decay=0.9, mu1=0.2, ok=None, ok_pair=None,
    )  # fmt: skip


def _restart(layers: Layers, make: Numbers) -> Arguments:
    """Of a step that restarts nothing."""
    H, A = [make.spd(x.n_a) for x in layers], [make.spd(x.n_a) for x in layers]
    marks, counts = ([make.counts()[:k] + 20 for _ in layers] for k in (3, 4))
    lam = [make.scalar(0.3) for _ in layers]
    return dict(H=H, pushed=[], marks=marks, counts=counts, lam=lam, A=A, X=[], force=[], after=10)


_ema = functools.partial(_curvature, from_X=False)
_minibatch = functools.partial(_curvature, from_X=True)

KERNELS = (
    Kernel("bfgs_update_", "bfgs_update_", _update, _update_blas),
    Kernel("curvature_update_, ema", "curvature_update_", _ema),
    Kernel("curvature_update_, minibatch", "curvature_update_", _minibatch),
    Kernel("restart_", "restart_", _restart),
)
