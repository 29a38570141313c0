"""bfgs_update: see README.md in this folder."""

from kbfgs_ext.ops import triton_backend
from kbfgs_ext.ops.bfgs_update import cuda as cuda
from kbfgs_ext.ops.bfgs_update import native as native
from kbfgs_ext.ops.bfgs_update import reference as reference
from kbfgs_ext.ops.bfgs_update.api import bfgs_update_, curvature_update_, restart_

__all__ = ["bfgs_update_", "curvature_update_", "restart_"]

triton_backend.register("bfgs_update", "bfgs_update_", "curvature_update_", "restart_")
