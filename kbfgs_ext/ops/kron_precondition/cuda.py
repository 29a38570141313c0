"""kron_precondition, the cuda backend: the CUDA kernels of csrc/kron_precondition."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("kron_precondition_", "kron_precondition", "cuda", environment.cuda_missing)
def kron_precondition_(*args) -> None:
    environment.native().kron_precondition_cuda(*args)


@register("momentum_", "kron_precondition", "cuda", environment.cuda_missing)
def momentum_(*args) -> None:
    environment.native().momentum_cuda(*args)


@register("descend_", "kron_precondition", "cuda", environment.cuda_missing)
def descend_(*args) -> None:
    environment.native().descend_cuda(*args)


@register("slope_", "kron_precondition", "cuda", environment.cuda_missing)
def slope_(*args) -> None:
    environment.native().slope_cuda(*args)


@register("output_change_", "kron_precondition", "cuda", environment.cuda_missing)
def output_change_(*args) -> None:
    environment.native().output_change_cuda(*args)


@register("restore_", "kron_precondition", "cuda", environment.cuda_missing)
def restore_(*args) -> None:
    environment.native().restore_cuda(*args)


@register("kron_step_", "kron_precondition", "cuda", environment.cuda_missing)
def kron_step_(*args) -> None:
    environment.native().kron_step_cuda(*args)
