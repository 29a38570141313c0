"""kron_precondition: see README.md in this folder."""

from kbfgs_ext.ops.kron_precondition.api import (
    descend_,
    kron_precondition_,
    kron_step_,
    lengths_,
    momentum_,
    output_change_,
    restore_,
    slope_,
)

__all__ = [
    "descend_",
    "kron_precondition_",
    "kron_step_",
    "lengths_",
    "momentum_",
    "output_change_",
    "restore_",
    "slope_",
]
