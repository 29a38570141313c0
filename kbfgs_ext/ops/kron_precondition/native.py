"""kron_precondition, the cpu backend: the C++ kernels of csrc/kron_precondition."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("kron_precondition_", "kron_precondition", "cpu", environment.native_missing)
def kron_precondition_(*args) -> None:
    environment.native().kron_precondition_cpu(*args)


@register("momentum_", "kron_precondition", "cpu", environment.native_missing)
def momentum_(*args) -> None:
    environment.native().momentum_cpu(*args)


@register("descend_", "kron_precondition", "cpu", environment.native_missing)
def descend_(*args) -> None:
    environment.native().descend_cpu(*args)


@register("slope_", "kron_precondition", "cpu", environment.native_missing)
def slope_(*args) -> None:
    environment.native().slope_cpu(*args)


@register("output_change_", "kron_precondition", "cpu", environment.native_missing)
def output_change_(*args) -> None:
    environment.native().output_change_cpu(*args)


@register("restore_", "kron_precondition", "cpu", environment.native_missing)
def restore_(*args) -> None:
    environment.native().restore_cpu(*args)


@register("kron_step_", "kron_precondition", "cpu", environment.native_missing)
def kron_step_(*args) -> None:
    environment.native().kron_step_cpu(*args)
