"""double_damping, the cuda backend: the CUDA kernels of csrc/double_damping."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("pair_ema_", "double_damping", "cuda", environment.cuda_missing)
def pair_ema_(*args) -> None:
    environment.native().pair_ema_cuda(*args)


@register("double_damping_", "double_damping", "cuda", environment.cuda_missing)
def double_damping_(*args) -> None:
    environment.native().double_damping_cuda(*args)
