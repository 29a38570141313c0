"""lbfgs_two_loop, the cpu backend: the C++ kernels of csrc/lbfgs_two_loop."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("lbfgs_two_loop_", "lbfgs_two_loop", "cpu", environment.native_missing)
def lbfgs_two_loop_(*args) -> None:
    environment.native().lbfgs_two_loop_cpu(*args)


@register("lbfgs_push_", "lbfgs_two_loop", "cpu", environment.native_missing)
def lbfgs_push_(*args) -> None:
    environment.native().lbfgs_push_cpu(*args)
