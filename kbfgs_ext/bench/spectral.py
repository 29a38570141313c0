"""spectral: arguments, and by torch's own: Muon's way for the products, LAPACK for the inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from kbfgs_ext.bench.kernel import Arguments, Kernel, Layers, Numbers
from kbfgs_ext.ops.spectral import COEFFICIENTS, SHIFTS, WEIGHTS
from kbfgs_ext.ops.spectral.api import workspace_size


def _polar(layers: Layers, make: Numbers) -> Arguments:
    P = [make.normal(x.n_g, x.n_a) for x in layers]
    work = [make.unset(workspace_size(x.n_g, x.n_a)) for x in layers]
    return dict(P=P, work=work, coefficients=COEFFICIENTS, ridge=0.0, shifts=None)


def _by_inverses(layers: Layers, make: Numbers) -> Arguments:
    return _polar(layers, make) | dict(coefficients=WEIGHTS, shifts=SHIFTS)


def _polar_blas(
    P: list[Tensor], work: list[Tensor], coefficients: tuple, ridge: float, shifts: None
) -> None:
    """The same iterations on P itself, as Muon does them."""
    for p in P:
        X = p if len(p) <= p.shape[1] else p.T
        G = X @ X.T
        norm = torch.linalg.matrix_norm(G)
        X, G = X / norm.sqrt(), G / norm
        for t in range(0, len(coefficients), 3):
            a, b, c = coefficients[t : t + 3]
            G = X @ X.T if t else G
            X = a * X + torch.addmm(G, G, G, beta=b, alpha=c) @ X
        p.copy_(X if len(p) <= p.shape[1] else X.T)


def _by_inverses_blas(
    P: list[Tensor], work: list[Tensor], coefficients: tuple, ridge: float, shifts: tuple
) -> None:
    for p in P:
        X = p if len(p) <= p.shape[1] else p.T
        G = X @ X.T
        norm = torch.linalg.matrix_norm(G)
        G /= norm
        eye = torch.eye(len(G), dtype=p.dtype, device=p.device)
        Z = coefficients[0] * eye
        for weight, shift in zip(coefficients[1:], shifts, strict=True):
            Z += weight * torch.cholesky_inverse(torch.linalg.cholesky_ex(G + shift * eye)[0])
        X = (Z / norm.sqrt()) @ X
        p.copy_(X if len(p) <= p.shape[1] else X.T)


KERNELS = (
    Kernel("polar_", "polar_", _polar, _polar_blas),
    Kernel("polar_, inverses", "polar_", _by_inverses, _by_inverses_blas),
)
