"""Cases of several processes, for ranks.py: kinds of layers, and factors in blocks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from kbfgs_ext import KBFGS
from tests.optim.distributed_cases import huber, net, of
from tests.optim.models import newton_l
from tests.optim.ranks import World, compare


class Images(nn.Sequential):
    """A small network of convolutions on rows of 5, as images of 1 x 5."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(),
            nn.Conv1d(4, 4, 2, stride=2, bias=False, groups=2), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip
        self.double()


def convolutions(world: World) -> None:
    for make in (of(), of(KBFGS), of(newton_l, memory=4)):
        compare(world, Images(), make, number=20, loss_of=huber)
    ema = of(KBFGS, hessian_action="ema", pair_every=3)
    compare(world, Images(), ema, plain=True, but=(" A",), number=15, loss_of=huber)
    rows = {"unequal": True, "plain": True, "mean_over": "rows"}
    compare(world, Images(), of(), **rows, number=15, loss_of=huber)


class Attentive(nn.Module):
    """Rows of 5 as sequences of five numbers, with attention between them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 4, bias), nn.Linear(20, 3, bias)
        self.attention = nn.MultiheadAttention(
            4, 2, bias=bias, batch_first=True, add_zero_attn=True
        )

    def forward(self, x):
        h = torch.tanh(self.first(x[..., None]))
        return self.last(self.attention(h, h, h)[0].flatten(1))


def parts_of_a_weight(world: World) -> None:
    for bias in (True, False):
        model = Attentive(bias).double()
        compare(world, copy.deepcopy(model), of(lr=0.1), number=15)
        compare(world, model, of(lr=0.1, block_size=3), plain=True, number=15)


def blocks(world: World) -> None:
    for make in (of(KBFGS, block_size=4), of(block_size=4), of(newton_l, memory=4, block_size=4)):
        compare(world, net(), make, number=20, loss_of=huber)
    compare(world, Images(), of(KBFGS, block_size=4), plain=True, number=15, loss_of=huber)
    ema = of(KBFGS, hessian_action="ema", block_size=4, restart_after=2)
    compare(world, net(), ema, but=(" A", " A.0", " A.1"), number=15, loss_of=huber)
