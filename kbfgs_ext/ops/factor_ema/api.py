"""factor_ema: the activation factor and its matrix-free sibling."""

from __future__ import annotations

import torch

from kbfgs_ext.ops import checks
from kbfgs_ext.ops.checks import Tensors
from kbfgs_ext.ops.library import op


@op("factor_ema", writes=("A", "a_bar"))
def factor_ema_(
    A: Tensors,
    a_bar: Tensors,
    X: Tensors,
    decay: float,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Update the activation factors and write the mean rows, for all layers.

    (1)  A <- decay*A + (1-decay) * X~'X~/m,   a_bar = X~'1/m,   X~ = [X, 1] or X

    Args:
        A: (n_a, n_a) each, symmetric, updated; an empty list writes ``a_bar`` alone.
        a_bar: (n_a,) each, written (also where ``ok`` is false).
        X: (m, d_in) each; n_a = d_in + 1 appends the implied column of ones.
        decay: in [0, 1); 0 starts the average.
        ok: bool scalar on the device; where false, or where a layer's mean squares are not
            finite, ``A`` keeps its value.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device or ``decay`` does not fit.

    Source: step 3 of the algorithm (kbfgs_ext/ops/README.md).
    """
    checks.backend(backend)
    checks.fraction("decay", decay)
    checks.same_length(a_bar=a_bar, X=X, **({"A": A} if A else {}))
    for i, (mean, x) in enumerate(zip(a_bar, X, strict=True)):
        checks.real("X", i, x)
        checks.rows("X", i, x, mean.shape[0])
        if A:
            checks.shape("A", i, A[i], mean.shape[0], mean.shape[0])
            checks.like("A", i, A[i], mean)


@op("factor_ema", writes=("y",))
def hessian_action_(
    y: Tensors, X: Tensors, s: Tensors, lam: Tensors, backend: str = "auto"
) -> None:
    """The damped activation factor of this minibatch times a vector, without the factor.

    (10)  y = X~'(X~ s)/m + lam*s

    Args:
        y: (n_a,) each, written.
        X: (m, d_in) each, as in `factor_ema_`.
        s: (n_a,) each.
        lam: float64 scalar each, on the device.
        backend: as in `factor_ema_`.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: step 9, ``hessian_action="minibatch"``.
    """
    checks.backend(backend)
    checks.same_length(y=y, X=X, s=s, lam=lam)
    for i, (out, x, v) in enumerate(zip(y, X, s, strict=True)):
        checks.rows("X", i, x, v.shape[0])
        checks.shape("y", i, out, v.shape[0])
        checks.like("y", i, out, v)
