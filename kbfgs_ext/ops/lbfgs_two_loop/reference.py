"""lbfgs_two_loop, the mathematics: equation (11) of kbfgs_ext/ops/README.md and of this README.

Rows of S and Y that hold no pair are taken as zero, and so is their rho: every formula below then
leaves them without effect, so that no loop bound has to be read from the device.
"""

from __future__ import annotations

import torch

from kbfgs_ext.ops.bfgs_update.reference import count, gate


def by_age(S, Y, rho, pushed) -> tuple[torch.Tensor, ...]:
    """The pairs from the oldest to the newest, and what rows hold one; the others come first."""
    order = (pushed + torch.arange(len(S), device=pushed.device)) % len(S)
    filled = order < pushed
    of_rows = filled[:, None]
    S, Y = torch.where(of_rows, S[order], 0.0), torch.where(of_rows, Y[order], 0.0)
    return S, Y, torch.where(filled, rho[order], 0.0), filled


def two_loop(Q, S, Y, rho, pushed) -> torch.Tensor:
    """H Q by the recursion (Nocedal 1980), H_0 = I."""
    S, Y, rho, _ = by_age(S, Y, rho, pushed)
    alpha = [None] * len(S)
    for j in reversed(range(len(S))):  # newest to oldest
        alpha[j] = rho[j] * (S[j] @ Q)
        Q = Q - Y[j][:, None] * alpha[j]
    for j in range(len(S)):  # oldest to newest
        beta = rho[j] * (Y[j] @ Q)
        Q = Q + S[j][:, None] * (alpha[j] - beta)
    return Q


def compact(Q, S, Y, rho, pushed) -> torch.Tensor:
    """H Q by the compact form (Byrd, Nocedal, Schnabel 1994, theorem 2.2), H_0 = I.

    With R = triu(S Y') and C = diag(S Y') (rows of S and Y are the pairs, oldest first),
    H = I + [S' Y'] [[R^-T (C + Y Y') R^-1, -R^-T], [-R^-1, 0]] [S; Y].
    """
    S, Y, _, filled = by_age(S, Y, rho, pushed)
    R = torch.triu(S @ Y.T)
    C = torch.diagonal(R).clone()
    R.diagonal().copy_(torch.where(filled, C, 1.0))  # an empty row: R^-1 of it is never used
    SQ, YQ = S @ Q, Y @ Q
    u = torch.linalg.solve_triangular(R, SQ, upper=True)  # R^-1 S Q
    v = C[:, None] * u + (Y @ Y.T) @ u - YQ
    v = torch.linalg.solve_triangular(R.T, v, upper=False)  # R^-T (...)
    return Q + S.T @ v - Y.T @ u


def lbfgs_two_loop_(out, Q, S, Y, rho, pushed, form) -> None:
    apply = compact if form == "compact" else two_loop
    for i in range(len(out)):
        columns = Q[i] if Q[i].dim() == 2 else Q[i][:, None]
        out[i].copy_(apply(columns, S[i], Y[i], rho[i], pushed[i]).reshape(out[i].shape))


def lbfgs_push_(S, Y, rho, pushed, counts, s, y, c, ok) -> None:
    for i in range(len(S)):
        finite = torch.isfinite(s[i] @ s[i]) & torch.isfinite(y[i] @ y[i])
        accept = gate(s[i], y[i], c[i], finite, ok)
        row = (
            torch.arange(S[i].shape[0], device=S[i].device) == pushed[i] % S[i].shape[0]
        ) & accept
        S[i].copy_(torch.where(row[:, None], s[i], S[i]))
        Y[i].copy_(torch.where(row[:, None], y[i], Y[i]))
        rho[i].copy_(torch.where(row, 1 / (s[i] @ y[i]), rho[i]))
        pushed[i].add_(accept)
        count(counts[i], accept, ok)
