"""lbfgs_two_loop: see README.md in this folder."""

from kbfgs_ext.ops import triton_backend
from kbfgs_ext.ops.lbfgs_two_loop import cuda as cuda
from kbfgs_ext.ops.lbfgs_two_loop import native as native
from kbfgs_ext.ops.lbfgs_two_loop import reference as reference
from kbfgs_ext.ops.lbfgs_two_loop.api import lbfgs_push_, lbfgs_two_loop_

__all__ = ["lbfgs_push_", "lbfgs_two_loop_"]

triton_backend.register("lbfgs_two_loop", "lbfgs_push_", "lbfgs_two_loop_")
