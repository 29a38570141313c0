"""safeguard: arguments. One of each for each layer; a step has one. Scalars: there is no BLAS."""

from __future__ import annotations

import torch

from kbfgs_ext.bench.kernel import Arguments, Kernel, Layers, Numbers
from kbfgs_ext.ops.safeguard.api import WORDS
from kbfgs_ext.optim.safeguard import SafeguardRule


def _decisions(layers: Layers, make: Numbers) -> list[torch.Tensor]:
    return [torch.zeros(WORDS, dtype=torch.bool, device=make.device) for _ in layers]


def _admit(layers: Layers, make: Numbers) -> Arguments:
    return dict(
        sound=[torch.tensor(True, device=make.device) for _ in layers],
        counts=[make.counts() for _ in layers], decision=_decisions(layers, make),
        loss=[torch.tensor(1.0, device=make.device) for _ in layers],
        norms=[torch.ones(16, device=make.device) for _ in layers], take=False,
    )  # fmt: skip


def _judge(layers: Layers, make: Numbers) -> Arguments:
    def scalars(value: float) -> list[torch.Tensor]:
        return [torch.tensor(value, device=make.device) for _ in layers]

    rule = SafeguardRule()
    standing = [0.0, float(rule.window), 1.0, 1.0]  # no loss but 1 for long
    watched = [torch.tensor(standing, device=make.device) for _ in layers]
    return dict(
        scale=scalars(1.0), watched=watched, counts=[make.counts() for _ in layers],
        decision=_decisions(layers, make), loss=scalars(1.0), loss_next=scalars(0.9),
        slope=scalars(-0.1), noise=1e-6, shrink=rule.shrink, grow=rule.grow,
        sufficient=rule.sufficient, smallest=rule.smallest, surge=rule.surge, window=rule.window,
        restart_after=10, take=False, ok=None,
    )  # fmt: skip


KERNELS = (Kernel("admit_", "admit_", _admit), Kernel("judge_", "judge_", _judge))
