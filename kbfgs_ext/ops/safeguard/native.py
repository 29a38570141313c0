"""safeguard, the cpu backend: the C++ code of csrc/safeguard."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import register


@register("judge_", "safeguard", "cpu", environment.native_missing)
def judge_(*args) -> None:
    environment.native().judge_cpu(*args)
