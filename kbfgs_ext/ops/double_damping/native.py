"""double_damping, the cpu backend: the C++ kernels of csrc/double_damping."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("pair_ema_", "double_damping", "cpu", environment.native_missing)
def pair_ema_(*args) -> None:
    environment.native().pair_ema_cpu(*args)


@register("double_damping_", "double_damping", "cpu", environment.native_missing)
def double_damping_(*args) -> None:
    environment.native().double_damping_cpu(*args)
