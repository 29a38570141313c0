"""lbfgs_two_loop: see README.md in this folder."""

from kbfgs_ext.ops.lbfgs_two_loop import cuda as cuda
from kbfgs_ext.ops.lbfgs_two_loop.api import lbfgs_push_, lbfgs_two_loop_

__all__ = ["lbfgs_push_", "lbfgs_two_loop_"]
