"""safeguard: arguments. A judgement for each layer; a step has one. Scalars: there is no BLAS."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.micro.kernel import Kernel, Layers, Numbers
from kbfgs_ext.optim.safeguard import SafeguardRule


def _judge(layers: Layers, make: Numbers) -> list[Any]:
    def scalars(value: float) -> list[torch.Tensor]:
        return [torch.tensor(value, device=make.device) for _ in layers]

    rule = SafeguardRule()
    standing = [0.0, float(rule.window), 1.0, 1.0]  # no loss but 1 for long
    watched = [torch.tensor(standing, device=make.device) for _ in layers]
    decision = [torch.zeros(3, dtype=torch.bool, device=make.device) for _ in layers]
    return [
        scalars(1.0), watched, [make.counts() for _ in layers], decision, scalars(1.0),
        scalars(0.9), scalars(-0.1), 1e-6, rule.shrink, rule.grow, rule.sufficient, rule.smallest,
        rule.surge, rule.window, 10, None,
    ]  # fmt: skip


KERNELS = (Kernel("judge_", "judge_", _judge),)
