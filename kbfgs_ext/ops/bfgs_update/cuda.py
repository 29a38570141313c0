"""bfgs_update, the cuda backend: the CUDA kernels of csrc/bfgs_update."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("bfgs_update_", "bfgs_update", "cuda", environment.cuda_missing)
def bfgs_update_(*args) -> None:
    environment.native().bfgs_update_cuda(*args)


@register("curvature_update_", "bfgs_update", "cuda", environment.cuda_missing)
def curvature_update_(*args) -> None:
    environment.native().curvature_update_cuda(*args)


@register("restart_", "bfgs_update", "cuda", environment.cuda_missing)
def restart_(*args) -> None:
    environment.native().restart_cuda(*args)
