"""bfgs_update: see README.md in this folder."""

from kbfgs_ext.ops.bfgs_update.api import bfgs_update_, curvature_update_, restart_

__all__ = ["bfgs_update_", "curvature_update_", "restart_"]
