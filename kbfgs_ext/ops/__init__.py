"""The ops of K-BFGS: seven families, each a folder with one implementation per backend.

Every op takes lists, with one entry per layer, and writes its arguments named first. See README.md
in this folder for symbols and equations and how an op is declared, `registry.py` for dispatch.
"""

from kbfgs_ext.ops.bfgs_update import bfgs_update_, curvature_update_, restart_
from kbfgs_ext.ops.double_damping import (
    double_damping_,
    measure_inputs_,
    measure_pair_,
    pair_ema_,
)
from kbfgs_ext.ops.factor_ema import factor_ema_, hessian_action_
from kbfgs_ext.ops.kron_precondition import (
    descend_,
    kron_precondition_,
    kron_step_,
    lengths_,
    momentum_,
    output_change_,
    restore_,
    slope_,
)
from kbfgs_ext.ops.lbfgs_two_loop import lbfgs_push_, lbfgs_two_loop_
from kbfgs_ext.ops.registry import FAMILIES, Unsupported
from kbfgs_ext.ops.safeguard import admit_, judge_
from kbfgs_ext.ops.spectral import polar_

__all__ = [
    "FAMILIES",
    "Unsupported",
    "admit_",
    "bfgs_update_",
    "curvature_update_",
    "descend_",
    "double_damping_",
    "factor_ema_",
    "hessian_action_",
    "judge_",
    "kron_precondition_",
    "kron_step_",
    "lbfgs_push_",
    "lbfgs_two_loop_",
    "lengths_",
    "measure_inputs_",
    "measure_pair_",
    "momentum_",
    "output_change_",
    "pair_ema_",
    "polar_",
    "restart_",
    "restore_",
    "slope_",
]
