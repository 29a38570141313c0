"""factor_ema: see README.md in this folder."""

from kbfgs_ext.ops.factor_ema.api import factor_ema_, hessian_action_

__all__ = ["factor_ema_", "hessian_action_"]
