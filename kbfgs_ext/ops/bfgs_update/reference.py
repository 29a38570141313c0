"""bfgs_update, the mathematics: equations (8) to (10) and (12) of kbfgs_ext/ops/README.md."""

from __future__ import annotations

import torch

from kbfgs_ext.ops.double_damping.reference import ACCEPTED, REJECTED, double_damping_, pair_ema_
from kbfgs_ext.ops.factor_ema.reference import hessian_action_

CURVATURE_GATE = 1e-4  # of (8), relative to s's*||c||: the authors' value


def gate(s, y, c, sound, ok) -> torch.Tensor:
    """(8): whether the pair may enter the factor; a bool scalar on the device.

    ``sound``: what depends on how it enters: all is finite, and y'Hy is not negative.
    """
    sy, ss = s @ y, s @ s
    accept = (sy > 0) & (sy > CURVATURE_GATE * ss * c.norm()) & torch.isfinite(1 / sy) & sound
    return accept if ok is None else accept & ok


def count(counts, accept, ok) -> None:
    """Count the pair as accepted or rejected, unless the whole step is void."""
    counts[ACCEPTED] += accept
    counts[REJECTED] += ~accept if ok is None else ~accept & ok


def bfgs_update_(H, counts, s, y, Hy, c, ok) -> None:
    for i in range(len(H)):
        Hy_i = Hy[i] if Hy else H[i] @ y[i]
        sy, yHy = s[i] @ y[i], y[i] @ Hy_i
        rho = 1 / sy
        coefficient = rho * rho * yHy + rho
        # Finite products imply finite vectors: 0 times Inf or NaN is NaN.
        finite = torch.isfinite(coefficient * (s[i] @ s[i])) & torch.isfinite(rho * (Hy_i @ Hy_i))
        accept = gate(s[i], y[i], c[i], finite & (yHy >= 0), ok)  # y'Hy < 0: H is indefinite
        H_new = H[i] - rho * (torch.outer(s[i], Hy_i) + torch.outer(Hy_i, s[i]))  # (9)
        H_new += coefficient * torch.outer(s[i], s[i])  # (9)
        H[i].copy_(torch.where(accept, H_new, H[i]))
        count(counts[i], accept, ok)


def curvature_update_(
    H_a, H_g, s, y, counts_a, counts_g, A, X, a_bar, h_change, g_bar, g_bar_next, lam_a, lam_g,
    pair_decay, mu1, ok, ok_pair,
) -> None:  # fmt: skip
    s_a = [H @ a for H, a in zip(H_a, a_bar, strict=True)]  # (10)
    if A:
        y_a = [A[i] @ s_a[i] + lam_a[i].to(s_a[i].dtype) * s_a[i] for i in range(len(A))]  # (10)
    else:
        y_a = [torch.empty_like(v) for v in s_a]
        hessian_action_(y_a, X, s_a, lam_a)  # (10)
    bfgs_update_(H_a, counts_a, s_a, y_a, [], a_bar, ok)

    # A void second pass leaves s, y and H_g alone; a layer whose own means are not finite too.
    for i in range(len(H_g)):
        averaged = [h_change[i]], [g_bar[i]], [g_bar_next[i]]
        fine = torch.stack([torch.isfinite(v).all() for (v,) in averaged]).all()
        fine = fine if ok_pair is None else fine & ok_pair
        pair_ema_([s[i]], [y[i]], *averaged, pair_decay, fine)
        s_g, y_g, Hy = s[i].clone(), y[i].clone(), torch.empty_like(y[i])  # damp only copies
        double_damping_([s_g], [y_g], [Hy], [counts_g[i]], [H_g[i]], [lam_g[i]], mu1, fine)
        bfgs_update_([H_g[i]], [counts_g[i]], [s_g], [y_g], [Hy], [g_bar[i]], fine)


def restart_(H, pushed, marks, counts, lam, A, X, force, after) -> None:
    for i in range(len(marks)):
        accepted, rejected = counts[i][ACCEPTED], counts[i][REJECTED]
        begin = torch.where(accepted > marks[i][0], rejected, marks[i][1])
        now = rejected - begin >= after  # (12)
        now = now | force[i] if force else now
        divisor = torch.ones_like(now, dtype=torch.float32)
        if i < len(A):
            divisor = lam[i] + A[i].diagonal().sum(dtype=lam[i].dtype)
        elif i < len(X):
            squares = torch.linalg.vector_norm(X[i], dtype=lam[i].dtype).square()
            divisor = lam[i] + squares / len(X[i]) + (len(H[i]) - X[i].shape[1])
        now = now & torch.isfinite(divisor)
        if H:
            H[i].masked_fill_(now, 0.0)
            H[i].diagonal().add_(torch.where(now, 1 / divisor, 0.0))  # (12)
        else:
            pushed[i].masked_fill_(now, 0)  # (12)
        begin = torch.where(now, rejected, begin)
        marks[i].copy_(torch.stack((accepted, begin, marks[i][2] + now)))
