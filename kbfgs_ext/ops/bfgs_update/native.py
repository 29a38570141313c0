"""bfgs_update, the cpu backend: the C++ kernels of csrc/bfgs_update."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("bfgs_update_", "bfgs_update", "cpu", environment.native_missing)
def bfgs_update_(*args) -> None:
    environment.native().bfgs_update_cpu(*args)


@register("curvature_update_", "bfgs_update", "cpu", environment.native_missing)
def curvature_update_(*args) -> None:
    environment.native().curvature_update_cpu(*args)


@register("restart_", "bfgs_update", "cpu", environment.native_missing)
def restart_(*args) -> None:
    environment.native().restart_cpu(*args)
