"""Cases of several processes, for ranks.py: kinds of layers, factors in blocks, norms."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext import KBFGS, FactorRule
from tests.optim.distributed_cases import huber, net, of
from tests.optim.models import newton_l
from tests.optim.models import snapshot as tensors_of
from tests.optim.ranks import BY_ROWS, SHARED, World, batches, compare, half_square, steps


class Images(nn.Sequential):
    """A small network of convolutions on rows of 5, as images of 1 x 5."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(),
            nn.Conv1d(4, 4, 2, stride=2, bias=False, groups=2), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip
        self.double()


def convolutions(world: World) -> None:
    for make in world.some((of(KBFGS), of(), of(newton_l, memory=4))):
        compare(world, Images(), make, loss_of=huber)
    if world.size > 2:
        return
    ema = of(KBFGS, hessian_action="ema", pair_every=3)
    compare(world, Images(), ema, plain=True, but=(" A",), number=15, loss_of=huber)
    rows = {"unequal": True, "plain": True, "ranks": BY_ROWS}
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
    makes = of(KBFGS, block_size=4), of(block_size=4), of(newton_l, memory=4, block_size=4)
    for make in world.some(makes):
        compare(world, net(), make, loss_of=huber)
    if world.size > 2:
        return
    compare(world, Images(), of(KBFGS, block_size=4), plain=True, number=15, loss_of=huber)
    ema = of(KBFGS, hessian_action="ema", block_size=4, factors=FactorRule(restart_after=2))
    compare(world, net(), ema, but=(" A", " A.0", " A.1"), number=15, loss_of=huber)


class SyncedNorm(nn.BatchNorm1d):
    """What `nn.SyncBatchNorm` computes, which runs on GPUs alone: statistics of all ranks, in the
    graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = all_reduce(x.mean(0)) / dist.get_world_size()
        square = all_reduce((x - mean).square().mean(0)) / dist.get_world_size()
        return (x - mean) * (square + self.eps).rsqrt() * self.weight + self.bias


def normed(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 8), kind(8), nn.Tanh(), nn.Linear(8, 3)).double()


def synced_batch_norm(world: World) -> None:
    """Statistics of the whole batch: one process's trajectory with BatchNorm."""
    x, y = batches()
    mine = world.slices()
    fallback = {"fallback": lambda p: torch.optim.AdamW(p, lr=0.02)}
    for options in world.some(({}, {"ranks": SHARED})):
        model, one = normed(SyncedNorm), normed(nn.BatchNorm1d)
        run = DDP(model)
        opt = KBFGS(run, pair_every=2, **fallback, **options)
        got = world.mean(steps(run, opt, x[mine], y[mine], 40, half_square))
        alone = KBFGS(one, pair_every=2, **fallback)
        wanted = torch.stack(steps(one, alone, x, y, 40, half_square))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        world.same_bits({name: p.detach() for name, p in model.named_parameters()})


class PartByPart(nn.Module):
    """Dropout or BatchNorm as the ranks have it, in one process: each part of the batch has its own
    statistics, and random numbers of its own generator."""

    def __init__(self, norm: nn.Module | None, generators: list[torch.Generator]) -> None:
        super().__init__()
        self.norm, self._generators = norm, generators

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(len(self._generators))
        if self.norm is not None:
            return torch.cat([self.norm(part) for part in parts])
        kept = [
            torch.empty_like(t).bernoulli_(0.5, generator=g)
            for t, g in zip(parts, self._generators, strict=True)
        ]
        return x * torch.cat(kept) * 2


def random_numbers_and_buffers(world: World) -> None:
    """Dropout and BatchNorm are each rank's own, as with DDP: a step is that of one process that
    has masks and statistics part by part."""
    layers = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)
    model = nn.Sequential(*layers).double()
    twin = copy.deepcopy(model)
    wrapped = DDP(model)
    fallback = {"fallback": lambda p: torch.optim.AdamW(p, lr=0.02)}
    opt = KBFGS(wrapped, pair_every=2, **fallback)
    x, y = batches()
    mine = world.slices()
    torch.manual_seed(world.rank)
    got = world.mean(steps(wrapped, opt, x[mine], y[mine], 40, half_square))
    world.same_bits({name: p.detach() for name, p in model.named_parameters()})
    assert model[1].num_batches_tracked == 40
    wrapped(x)  # sends rank 0's buffers, as in every first pass
    assert wrapped.require_forward_param_sync
    world.same_bits(tensors_of(model, opt))

    generators = [torch.Generator().manual_seed(rank) for rank in range(world.size)]
    twin[1], twin[2] = PartByPart(twin[1], generators), PartByPart(None, generators)
    one = KBFGS(twin, pair_every=2, generators=generators, **fallback)
    wanted = torch.stack(steps(twin, one, x, y, 40, half_square))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
