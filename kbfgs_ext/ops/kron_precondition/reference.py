"""kron_precondition, the mathematics: equations (2) to (4), (13), (15) and (23) of ../README.md.

A layer without a bias has an empty tensor in the place of its bias.
"""

from __future__ import annotations

import torch

SHORTEST = 1e-20  # length of a direction that still is one


def joined(W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[W, b], n_g x n_a."""
    return torch.cat([W, b[:, None]], dim=1) if b.numel() else W


def momentum_(M, dW, db, W, b, momentum, weight_decay, ok) -> None:
    for i in range(len(M)):
        D = joined(dW[i], db[i]).to(M[i].dtype)
        D = D + weight_decay * joined(W[i], b[i]).to(M[i].dtype)  # (2)
        M_new = momentum * M[i] + (1 - momentum) * D  # (2)
        M[i].copy_(M_new if ok is None else torch.where(ok, M_new, M[i]))


def kron_precondition_(P, H_g, M, H_a) -> None:
    for i in range(len(P)):
        left = H_g[i] @ M[i] if H_g else M[i]
        P[i].copy_(left @ H_a[i] if H_a else left)  # (3)


def descend_(W, b, P, step_size, ok) -> None:
    for i in range(len(W)):
        before = joined(W[i], b[i]).to(P[i].dtype)
        after = before - step_size[i].to(P[i].dtype) * P[i]  # (4)
        after = after if ok is None else torch.where(ok, after, before)
        P[i].copy_(before)  # what restore_ puts back
        _write(W[i], b[i], after)


def slope_(slope, W, b, saved, dW, db) -> None:
    for i in range(len(slope)):
        moved = joined(W[i], b[i]).to(saved[i].dtype) - saved[i]
        slope[i].copy_((joined(dW[i], db[i]).to(saved[i].dtype) * moved).sum(dim=1))  # (13)


def output_change_(change, W, b, saved, a_bar, a_bar_next) -> None:
    for i in range(len(change)):
        moved = joined(W[i], b[i]).to(saved[i].dtype) - saved[i]
        change[i].copy_(moved @ a_bar_next[i] + saved[i] @ (a_bar_next[i] - a_bar[i]))  # (15)


def restore_(W, b, saved, undo) -> None:
    for i in range(len(W)):
        _write(W[i], b[i], torch.where(undo, saved[i], joined(W[i], b[i]).to(saved[i].dtype)))


def lengths_(sizes, norms, roots, step_size, shared) -> None:
    for i in range(len(sizes)):
        lengths, size = norms[i].to(sizes[i].dtype).clamp(min=SHORTEST), step_size[i]
        if shared:
            size = size * torch.linalg.vector_norm(lengths) / torch.linalg.vector_norm(roots[i])
        sizes[i].copy_(size * roots[i] / lengths)  # (23)


def kron_step_(W, b, M, P, dW, db, H_g, H_a, step_size, momentum, weight_decay, ok) -> None:
    momentum_(M, dW, db, W, b, momentum, weight_decay, ok)
    kron_precondition_(P, H_g, M, H_a)
    descend_(W, b, P, step_size, ok)


def _write(W: torch.Tensor, b: torch.Tensor, joined_: torch.Tensor) -> None:
    W.copy_(joined_[:, : W.shape[1]])
    if b.numel():
        b.copy_(joined_[:, W.shape[1]])
