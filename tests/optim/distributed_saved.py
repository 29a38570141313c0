"""Cases of several processes, for ranks.py: `torch.distributed.checkpoint` of shared work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext import KBFGS
from tests.optim.distributed_shards import layer_by_layer
from tests.optim.distributed_states import raises
from tests.optim.ranks import SHARED, World, batches, half_square, steps, whole

Made = tuple[nn.Module, nn.Module, Any]


def alone(model: nn.Module) -> Made:
    return model, model, optimizer(model)


def shared(model: nn.Module) -> Made:
    run = DDP(model)
    return model, run, optimizer(run, ranks=SHARED)


def cut(model: nn.Module) -> Made:
    layer_by_layer(model)
    return model, model, optimizer(model)


def optimizer(model: nn.Module, **options: Any) -> KBFGS:
    fallback = lambda p: torch.optim.AdamW(p, lr=0.02)  # noqa: E731
    return KBFGS(model, fallback=fallback, pair_every=2, block_size=6, **options)


def fresh(make: Callable[[nn.Module], Made]) -> Made:
    layers = nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 7), nn.Linear(7, 3)
    return make(nn.Sequential(*layers).double())


def state_of(model: nn.Module, opt: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": opt.state_dict()}


def train(run: nn.Module, opt: Any, world: World, mine: slice) -> torch.Tensor:
    x, y = batches()
    losses = steps(run, opt, x[mine], y[mine], 4, half_square)
    return torch.stack(losses) if opt.steps.process.alone else world.mean(losses)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [whole(p).detach().clone() for p in model.parameters()]


def saved(world: World) -> None:
    """Train, save, and note how it goes on."""
    for make in (shared, cut):
        model, run, opt = fresh(make)
        train(run, opt, world, world.slices())
        path = world.directory / make.__name__
        dcp.save(state_of(model, opt), checkpoint_id=path)
        seen = train(run, opt, world, world.slices()), weights_of(model)
        if world.rank == 0:
            torch.save(seen, path.with_suffix(".pt"))


def loaded(world: World) -> None:
    """The same on another number of ranks to rounding, on the same bit for bit; on one as well, and
    sharded what was not."""
    for name in ("shared", "cut"):
        path = world.directory / name
        losses, weights = torch.load(path.with_suffix(".pt"))
        for make in (shared, cut, *([alone] if world.rank == 0 else [])):
            torch.manual_seed(1)
            model, run, opt = fresh(make)
            state = state_of(model, opt)
            dcp.load(state, checkpoint_id=path, no_dist=make is alone)
            model.load_state_dict(state["model"])
            opt.load_state_dict(state["optimizer"])
            got = train(run, opt, world, slice(None) if make is alone else world.slices())
            torch.testing.assert_close(got, losses, rtol=1e-10, atol=1e-10)
            if make.__name__ == name and world.size == 2:
                assert torch.equal(got, losses)
                assert all(map(torch.equal, weights_of(model), weights))


def tools_of_torch(world: World) -> None:
    """State dicts by names, as `torch.distributed.checkpoint.state_dict` makes them."""
    for make in (shared, cut):
        model, run, opt = fresh(make)
        train(run, opt, world, world.slices())
        path = world.directory / f"named_{make.__name__}"
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(run, opt)}
        dcp.save(state, checkpoint_id=path)
        wanted = train(run, opt, world, world.slices())
        torch.manual_seed(1)
        model, run, opt = fresh(make)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(run, opt)}
        dcp.load(state, checkpoint_id=path)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(run, opt, state["optimizer"])
        assert torch.equal(train(run, opt, world, world.slices()), wanted)
        one: list[Any] = [opt.state_dict() if make is shared else None]
        dist.broadcast_object_list(one, 0)
        if world.rank and make is shared:
            said = raises(ValueError, lambda o=opt, s=one[0]: o.load_state_dict(s))
            assert "of layer '" in said and "torch.distributed.checkpoint puts" in said
