"""spectral: arguments, and the same iterations on P itself, as Muon does them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.micro.kernel import Arguments, Kernel, Layers, Numbers
from kbfgs_ext.ops.spectral import COEFFICIENTS
from kbfgs_ext.ops.spectral.api import workspace_size


def _polar(layers: Layers, make: Numbers) -> Arguments:
    P = [make.normal(x.n_g, x.n_a) for x in layers]
    work = [make.unset(workspace_size(x.n_g, x.n_a)) for x in layers]
    return dict(P=P, work=work, coefficients=COEFFICIENTS, ridge=0.0, shifts=None)


def _polar_blas(
    P: list[Tensor], work: list[Tensor], coefficients: tuple, ridge: float, shifts: None
) -> None:
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


KERNELS = (Kernel("polar_", "polar_", _polar, _polar_blas),)
