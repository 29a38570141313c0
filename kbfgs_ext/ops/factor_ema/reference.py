"""factor_ema, the mathematics: equations (1) and (10) of kbfgs_ext/ops/README.md."""

from __future__ import annotations

import torch


def augmented(X: torch.Tensor, n_a: int) -> torch.Tensor:
    """X~ = [X, 1] where the factor has one row more than X has columns, else X."""
    return X if n_a == X.shape[1] else torch.cat([X, X.new_ones(X.shape[0], 1)], dim=1)


def factor_ema_(A, a_bar, X, decay, ok) -> None:
    for i in range(len(X)):
        X_t = augmented(X[i].to(a_bar[i].dtype), a_bar[i].shape[0])  # m x n_a
        m = X_t.shape[0]
        a_bar[i].copy_(X_t.mean(0))  # (1)
        if A:
            # Cauchy-Schwarz: a finite diagonal of X~'X~ bounds every entry.
            keep = torch.isfinite(X_t.square().sum(0)).all()
            keep = keep if ok is None else keep & ok
            new = decay * A[i] + (1 - decay) * (X_t.T @ X_t) / m  # (1)
            A[i].copy_(torch.where(keep, new, A[i]))


def hessian_action_(y, X, s, lam) -> None:
    for i in range(len(X)):
        X_t = augmented(X[i].to(s[i].dtype), s[i].shape[0])
        y[i].copy_(X_t.T @ (X_t @ s[i]) / X_t.shape[0] + lam[i].to(s[i].dtype) * s[i])  # (10)
