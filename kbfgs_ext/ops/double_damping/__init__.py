"""double_damping: see README.md in this folder."""

from kbfgs_ext.ops import triton_backend
from kbfgs_ext.ops.double_damping import cuda as cuda
from kbfgs_ext.ops.double_damping import native as native
from kbfgs_ext.ops.double_damping import reference as reference
from kbfgs_ext.ops.double_damping.api import double_damping_, pair_ema_

__all__ = ["double_damping_", "pair_ema_"]

triton_backend.register("double_damping", "double_damping_", "pair_ema_")
