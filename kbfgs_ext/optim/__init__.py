"""The optimizers. Data flows one way: capture -> factors -> method -> ops."""

from kbfgs_ext.optim.kbfgs import KBFGS, KBFGSL

__all__ = ["KBFGS", "KBFGSL"]
