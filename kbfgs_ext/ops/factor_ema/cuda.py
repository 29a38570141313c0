"""factor_ema, the cuda backend: the CUDA kernels of csrc/factor_ema."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("factor_ema_", "factor_ema", "cuda", environment.cuda_missing)
def factor_ema_(*args) -> None:
    environment.native().factor_ema_cuda(*args)


@register("hessian_action_", "factor_ema", "cuda", environment.cuda_missing)
def hessian_action_(*args) -> None:
    environment.native().hessian_action_cuda(*args)
