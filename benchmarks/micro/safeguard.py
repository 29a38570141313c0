"""safeguard: arguments. A judgement for each layer; a step has one. Scalars: there is no BLAS."""

from __future__ import annotations

import torch

from benchmarks.micro.kernel import Arguments, Kernel, Layers, Numbers
from kbfgs_ext.optim.safeguard import SafeguardRule


def _judge(layers: Layers, make: Numbers) -> Arguments:
    def scalars(value: float) -> list[torch.Tensor]:
        return [torch.tensor(value, device=make.device) for _ in layers]

    rule = SafeguardRule()
    standing = [0.0, float(rule.window), 1.0, 1.0]  # no loss but 1 for long
    watched = [torch.tensor(standing, device=make.device) for _ in layers]
    decision = [torch.zeros(3, dtype=torch.bool, device=make.device) for _ in layers]
    return dict(
        scale=scalars(1.0), watched=watched, counts=[make.counts() for _ in layers],
        decision=decision, loss=scalars(1.0), loss_next=scalars(0.9), slope=scalars(-0.1),
        noise=1e-6, shrink=rule.shrink, grow=rule.grow, sufficient=rule.sufficient,
        smallest=rule.smallest, surge=rule.surge, window=rule.window, restart_after=10, ok=None,
    )  # fmt: skip


KERNELS = (Kernel("judge_", "judge_", _judge),)
