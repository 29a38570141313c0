"""Cases of several processes, for ranks.py: a rank that fails, and what the others learn of it."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.optim.distributed_cases import net
from tests.optim.distributed_shards import layer_by_layer
from tests.optim.distributed_states import broken, raises
from tests.optim.models import newton
from tests.optim.models import snapshot as tensors_of
from tests.optim.ranks import SHARED, World, batches, half_square, steps


def started(world: World, plain: bool, number: int = 3, **options: Any) -> tuple:
    """A network, what is trained (itself or its DDP), the optimizer after so many steps, and the
    parameters as they are then."""
    x, y = batches()
    model = net()
    run: nn.Module = model if plain else DDP(model)
    opt = newton(run, process_group=dist.group.WORLD, **options)
    steps(run, opt, x[world.slices()], y[world.slices()], number, half_square)
    return model, run, opt, {name: p.clone() for name, p in model.named_parameters()}


def not_finite_on_one_rank(world: World) -> None:
    """A NaN in the first pass of one rank voids the step on all; one in the second undoes it."""
    x, y = batches()
    mine = world.slices()
    for plain in (False, True):
        model, run, opt, before = started(world, plain)
        bad = x[mine].clone()
        if world.rank == 1:
            bad[0, 0] = float("nan")
        steps(run, opt, bad, y[mine], 1, half_square)
        assert opt.counters()["skipped"] == 1
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
        calls = []

        def loss_of(model, x, y, calls=calls):
            calls.append(0)
            loss = half_square(model, x, y)
            return loss * float("nan") if len(calls) == 2 and world.rank == 1 else loss

        steps(run, opt, x[mine], y[mine], 1, loss_of)
        assert opt.counters()["undone"] == 1
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
        steps(run, opt, x[mine], y[mine], 3, half_square)
        world.same_bits(tensors_of(model, opt))


def a_rank_raises(world: World) -> None:
    """The others say which and why; nothing has moved, and training may go on."""
    x, y = batches()
    mine = world.slices()
    for plain in (False, True):
        model, run, opt, before = started(world, plain)
        for where in ("before", "after", "second", "loss"):
            if where == "before" and not plain:
                continue  # the others wait inside DDP
            calls = []

            def closure(where=where, calls=calls, run=run, opt=opt):
                calls.append(0)
                here = world.rank == 1
                if where == "before" and here:
                    raise KeyError("before")
                opt.zero_grad()
                loss = half_square(run, x[mine], y[mine])
                loss.backward()
                if (where == "after" or (where == "second" and len(calls) == 2)) and here:
                    raise ValueError("the metric failed")
                return "no loss" if where == "loss" and here else loss

            if world.rank == 1:
                kinds = {"before": KeyError, "loss": TypeError}
                raises(kinds.get(where, ValueError), lambda c=closure, o=opt: o.step(c))
            else:
                said = raises(RuntimeError, lambda c=closure, o=opt: o.step(c))
                why = {
                    "before": "KeyError: 'before'",
                    "loss": "TypeError: closure must return",
                }.get(where, "ValueError: the metric failed")
                assert f"rank 1 failed with {why}" in said, said
            for name, p in model.named_parameters():
                assert torch.equal(before[name], p), (where, name)
        steps(run, opt, x[mine], y[mine], 3, half_square)
        world.same_bits(tensors_of(model, opt))


def an_op_fails(world: World) -> None:
    """On one rank, before the last exchange of a step: all take it back, and go on alike. After it
    the others have the step, and learn of the failure in the next one: no rank goes on alone."""
    x, y = batches()
    mine, one = world.slices(), world.rank == 1
    why = "rank 1 failed with OSError: no memory"
    for plain in (False, True):
        for before_it, op, apart in (
            (2, "kron_step_", False),
            (2, "output_change_", True),
            (3, "kron_step_", False),  # a step without a second pass
            (3, "bfgs_update_", True),
        ):
            model, run, opt, before = started(world, plain, before_it, pair_every=2)

            def train(number: int, opt=opt, run=run) -> None:
                steps(run, opt, x[mine], y[mine], number, half_square)

            with broken(op, one):
                if one:
                    raises(OSError, lambda t=train: t(1))
                else:
                    assert raises(RuntimeError, lambda t=train, n=1 + apart: t(n)) == why
            if apart and not plain and one:  # it goes on, and sees that it is not where they are
                assert "not in the same place" in raises(RuntimeError, lambda t=train: t(1))
            if one or not apart:
                for name, p in model.named_parameters():
                    assert torch.equal(before[name], p), (op, name)
            if apart:
                said = raises(RuntimeError, lambda t=train: t(1))
                assert "not in the same place" in said or (said == why and not plain and not one)
            else:
                train(2)
                world.same_bits(tensors_of(model, opt))


def others_wait_elsewhere(world: World) -> None:
    """A rank fails where the others wait for its gradients, its rows of the weights or its P: at
    the timeout of their group they learn who, and why."""
    x, y = batches()
    mine, one = world.slices(), world.rank == 1

    def group() -> dist.ProcessGroup:
        dist.barrier()
        return dist.new_group(timeout=datetime.timedelta(seconds=6))

    def wrapped(model: nn.Module) -> nn.Module:
        return DDP(model, process_group=group())

    def cut(model: nn.Module) -> nn.Module:
        layer_by_layer(model, mesh=DeviceMesh.from_group(group(), "cpu"))
        return model

    def fails_in(kind: type[Exception], call: Callable[[], Any]) -> None:
        if one:
            raises(kind, call)
        else:
            said = raises(RuntimeError, call)
            assert said.startswith(f"rank 1 failed with {kind.__name__}: "), said

    for make in (wrapped, cut):
        run, breaks = make(net()), [True]
        time.sleep(0 if one else 0.5)  # the note is there before the others' optimizer
        opt = newton(run)

        def closure(run=run, opt=opt, breaks=breaks) -> torch.Tensor:
            opt.zero_grad()
            if one and breaks[0]:
                raise KeyError("before")
            loss = half_square(run, x[mine], y[mine])
            loss.backward()
            return loss

        def step(opt=opt, closure=closure) -> torch.Tensor:
            return opt.step(closure)

        if make is wrapped:
            if one:
                raises(KeyError, step)
            breaks[0] = False
            step()  # the others have waited for this
            breaks[0] = True
        fails_in(KeyError, step)

    run = wrapped(net())
    opt = newton(run, ranks=SHARED)
    with broken("momentum_", one):
        fails_in(OSError, lambda: steps(run, opt, x[mine], y[mine], 1, half_square))


def ranks_out_of_step(world: World) -> None:
    model = net()
    opt = newton(model, process_group=dist.group.WORLD)
    x, y = batches()
    steps(model, opt, x, y, 2, half_square)
    opt.steps.number += world.rank
    said = raises(RuntimeError, lambda: steps(model, opt, x, y, 1, half_square))
    assert "the ranks are not in the same place" in said


def last(world: World) -> None:
    """A rank ends in the middle of a step: the others learn of it."""
    model = net()
    opt = newton(model, process_group=dist.group.WORLD)
    x, y = batches()
    steps(model, opt, x, y, 1, half_square)
    if world.rank == world.size - 1:
        os._exit(0)
    said = raises(RuntimeError, lambda: steps(model, opt, x, y, 1, half_square))
    assert "not all of them come" in said
