"""factor_ema: see README.md in this folder."""

from kbfgs_ext.ops import triton_backend
from kbfgs_ext.ops.factor_ema import cuda as cuda
from kbfgs_ext.ops.factor_ema import native as native
from kbfgs_ext.ops.factor_ema import reference as reference
from kbfgs_ext.ops.factor_ema.api import factor_ema_, hessian_action_

__all__ = ["factor_ema_", "hessian_action_"]

triton_backend.register("factor_ema", "factor_ema_", "hessian_action_")
