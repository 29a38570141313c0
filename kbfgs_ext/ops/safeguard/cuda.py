"""safeguard, the cuda backend: the CUDA kernel of csrc/safeguard."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("judge_", "safeguard", "cuda", environment.cuda_missing)
def judge_(*args) -> None:
    environment.native().judge_cuda(*args)
