"""factor_ema: arguments, and the same from BLAS calls."""

from __future__ import annotations

from torch import Tensor

from kbfgs_ext.bench.kernel import Arguments, Kernel, Layers, Numbers


def _ema(layers: Layers, make: Numbers) -> Arguments:
    A = [make.spd(x.n_a) for x in layers]
    a_bar = [make.unset(x.n_a) for x in layers]
    X = [make.normal(make.batch, x.d_in) for x in layers]
    return dict(A=A, a_bar=a_bar, X=X, decay=0.9, ok=None)


def _ema_blas(A: list, a_bar: list, X: list, decay: float) -> None:
    for A_i, mean, x in zip(A, a_bar, X, strict=True):
        m, d = x.shape
        mean.fill_(1)
        mean[:d] = x.mean(0)
        x = x.to(A_i.dtype)
        A_i[:d, :d].addmm_(x.T, x, beta=decay, alpha=(1 - decay) / m)
        if len(A_i) > d:  # the implied column of ones
            A_i[d].lerp_(mean, 1 - decay)
            A_i[:d, d] = A_i[d, :d]


def _action(layers: Layers, make: Numbers) -> Arguments:
    X = [make.normal(make.batch, x.d_in) for x in layers]
    s = [make.vector(x.n_a) for x in layers]
    y, lam = [make.unset(x.n_a) for x in layers], [make.scalar(0.55) for _ in layers]
    return dict(y=y, X=X, s=s, lam=lam)


def _action_blas(y: list, X: list, s: list, lam: list) -> None:
    for y_i, x, s_i, lam_i in zip(y, X, s, lam, strict=True):
        m, d = x.shape
        x = x.to(s_i.dtype)
        Xs: Tensor = x @ s_i[:d]
        if len(s_i) > d:
            Xs += s_i[d]
            y_i[d] = Xs.mean()
        y_i[:d] = (x.T @ Xs).div_(m)
        y_i.addcmul_(s_i, lam_i.to(s_i.dtype))


KERNELS = (
    Kernel("factor_ema_", "factor_ema_", _ema, _ema_blas),
    Kernel("hessian_action_", "hessian_action_", _action, _action_blas),
)
