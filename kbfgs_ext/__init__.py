"""K-BFGS and K-BFGS(L) for PyTorch: an optimizer, its kernels, their proof.

    from kbfgs_ext import KBFGS
    opt = KBFGS(model, lr=0.3, damping=0.3)
    loss = opt.step(closure)

Source: Goldfarb, Ren, Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks",
NeurIPS 2020 (arXiv 2006.08877).
"""

from kbfgs_ext import ops, presets
from kbfgs_ext.ops.registry import explain
from kbfgs_ext.optim import (
    KBFGS,
    KBFGSL,
    CapturedStep,
    DirectionRule,
    FactorRule,
    Kind,
    Precision,
    RankRule,
    SafeguardRule,
    View,
    register_kind,
)

__version__ = "0.2.0"

__all__ = [
    "KBFGS",
    "KBFGSL",
    "CapturedStep",
    "DirectionRule",
    "FactorRule",
    "Kind",
    "Precision",
    "RankRule",
    "SafeguardRule",
    "View",
    "explain",
    "ops",
    "presets",
    "register_kind",
]
