"""The optimizers. Data flows one way: capture -> factors -> step -> ops."""

from kbfgs_ext.optim.graph import CapturedStep
from kbfgs_ext.optim.kbfgs import KBFGS, KBFGSL
from kbfgs_ext.optim.layers import Kind, View, register_kind
from kbfgs_ext.optim.rules import DirectionRule, FactorRule, Precision, RankRule
from kbfgs_ext.optim.safeguard import SafeguardRule

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
    "register_kind",
]
