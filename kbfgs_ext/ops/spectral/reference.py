"""spectral, the mathematics: equations (16) to (19) of README.md in this folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def polar(
    P: torch.Tensor,
    coefficients: Sequence[float],
    ridge: float,
    shifts: Sequence[float] | None = None,
) -> torch.Tensor:
    """(16) to (19) for one layer; with ``shifts`` (18') in place of (18)."""
    wide = P.shape[0] <= P.shape[1]
    X = P if wide else P.T  # k x n, k <= n
    k = X.shape[0]
    tiny = torch.finfo(P.dtype).tiny
    X = X / X.abs().max().clamp(min=tiny)  # its squares neither over- nor underflow
    G = X @ X.T  # (16)
    mean = G.diagonal().sum() / k
    norm = torch.linalg.vector_norm(G) + ridge * mean
    norm = norm.clamp(min=tiny)  # P = 0 stays
    eye = torch.eye(k, dtype=P.dtype, device=P.device)
    G = (G + ridge * mean * eye) / norm  # (17)
    if shifts is not None:
        Z = coefficients[0] * eye
        for w, s in zip(coefficients[1:], shifts, strict=True):
            Z = Z + w * torch.linalg.inv_ex(G + s * eye)[0]  # (18')
    else:
        Z = eye
        for t in range(0, len(coefficients), 3):
            a, b, c = coefficients[t : t + 3]
            R = a * eye + b * G + c * (G @ G)  # (18)
            Z, G = R @ Z, R @ (R @ G)  # (18)
    U = (Z / norm.sqrt()) @ X  # (19)
    return U if wide else U.T


def polar_(P, coefficients, ridge, shifts) -> None:
    for p in P:
        p.copy_(polar(p, coefficients, ridge, shifts))
