"""Cases of several processes: starts, checkpoints, what is sent, and what goes wrong."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext import CapturedStep, RankRule
from kbfgs_ext.ops import registry
from tests.optim.distributed_cases import net
from tests.optim.models import newton, rows
from tests.optim.models import snapshot as tensors_of
from tests.optim.ranks import BY_ROWS, World, batches, compare, half_square, steps


def raises(kind: type[BaseException], call) -> str:
    """The message of the error that ``call`` raises."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


@contextlib.contextmanager
def broken(op: str, here: bool) -> Iterator[None]:
    """The op fails on this rank."""
    run = registry.run

    def fails(name: str, backend: Any, call: Any) -> None:
        if name == op:
            raise OSError("no memory")
        run(name, backend, call)

    registry.run = fails if here else run
    try:
        yield
    finally:
        registry.run = run


# ---------------------------------------------------------------------- starts and checkpoints


def warm_start(world: World) -> None:
    """A_0 is the average over the batches of all ranks, which need not have equally many."""
    for action in ("ema", "minibatch"):
        torch.manual_seed(0)
        model, twin = net(), net()
        twin.load_state_dict(model.state_dict())
        data = [rows(6, 5, seed=s) for s in range(world.size * 2 + 1)]
        theirs = [data[2 * r : 2 * r + 2] for r in range(world.size)]
        theirs[0].append(data[-1])
        wrapped = DDP(model)
        opt = newton(wrapped, hessian_action=action)
        opt.warm_start(theirs[world.rank])
        x, y = batches()
        mine = world.slices()
        got = world.mean(steps(wrapped, opt, x[mine], y[mine], 10, half_square))
        world.same_bits({k: t for k, t in tensors_of(model, opt).items() if not k.endswith(" A")})
        if world.rank == 0:
            one = newton(twin, hessian_action=action)
            one.warm_start(data)
            wanted = torch.stack(steps(twin, one, x, y, 10, half_square))
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        bad = newton(DDP(net()), hessian_action=action)
        data = [x.clone()]
        if world.rank == 1:
            data[0][0, 0] = float("nan")
        said = raises(ValueError, lambda b=bad, d=data: b.warm_start(d))
        assert ("batch 0" if world.rank == 1 else "another rank") in said

    def broken():
        yield x
        if world.rank == 1:
            raise OSError("no such file")

    kind = OSError if world.rank == 1 else RuntimeError
    said = raises(kind, lambda: newton(DDP(net())).warm_start(broken()))
    assert world.rank == 1 or said == "rank 1 failed with OSError: no such file"


def resume(world: World) -> None:
    """What one rank saves, all load, and go on bit for bit; each rank's own A is said to be so."""
    x, y = batches()
    mine = world.slices()
    for action in ("minibatch", "ema"):
        torch.manual_seed(0)
        model = net()
        wrapped = DDP(model)
        opt = newton(wrapped, hessian_action=action)
        steps(wrapped, opt, x[mine], y[mine], 6, half_square)
        if action == "ema":
            mixed: list[Any] = [opt.state_dict()]
            dist.broadcast_object_list(mixed, 0)
            if world.rank:
                said = raises(ValueError, lambda o=opt, m=mixed: o.load_state_dict(m[0]))
                assert "share that rank 0 of" in said and "consolidate" in said
            opt.load_state_dict(opt.state_dict())  # its own
        opt.consolidate()
        world.same_bits(tensors_of(model, opt))
        saved: list[Any] = [copy.deepcopy((model.state_dict(), opt.state_dict()))]
        dist.broadcast_object_list(saved, 0)
        fresh = net()
        again = DDP(fresh)
        resumed = newton(again, hessian_action=action)
        fresh.load_state_dict(saved[0][0])
        resumed.load_state_dict(saved[0][1])
        a = steps(wrapped, opt, x[mine], y[mine], 6, half_square)
        b = steps(again, resumed, x[mine], y[mine], 6, half_square)
        # Of more than two numbers DDP's sum depends on its buckets, which it makes anew in use.
        close = 0.0 if world.size == 2 else 1e-12
        torch.testing.assert_close(a, b, rtol=close, atol=close)
        if world.rank == 0:  # one process goes on with it as well
            alone = net()
            one = newton(alone, hessian_action=action)
            alone.load_state_dict(saved[0][0])
            one.load_state_dict(saved[0][1])
            wanted = torch.stack(steps(alone, one, x, y, 6, half_square))
        got = world.mean(a)
        if world.rank == 0:
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        of_torch = get_optimizer_state_dict(wrapped, opt)  # as torch.distributed.checkpoint has it
        names = {name for name, _ in model.named_parameters()}
        assert names <= set(of_torch["state"]), of_torch["state"].keys()
        set_optimizer_state_dict(again, resumed, of_torch)
        opt.restart()
        steps(wrapped, opt, x[mine], y[mine], 3, half_square)
        world.same_bits({k: t for k, t in tensors_of(model, opt).items() if not k.endswith(" A")})


# ---------------------------------------------------------------------- what is refused


def optimizer_of_the_bare_model(world: World) -> None:
    """With DDP around the model that is an error, and with the group as well it is not."""
    model = net()
    wrapped = DDP(model)
    x, y = batches()
    opt = newton(model)
    said = raises(RuntimeError, lambda: steps(wrapped, opt, x, y, 1, half_square))
    assert "KBFGS(ddp_model)" in said
    steps(model, newton(model), x, y, 1, half_square)  # processes that have nothing to do together
    group = dist.group.WORLD
    compare(world, net(), lambda m, **o: newton(getattr(m, "module", m), **o), process_group=group)
    compare(world, net(), lambda m, **o: newton(torch.compile(m, backend="eager"), **o), number=3)


def refusals(world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world.size,))
    ignored = net()
    fully_shard(ignored, mesh=mesh, ignored_params={ignored[0].weight})
    assert "'0.weight' of the model is not" in raises(NotImplementedError, lambda: newton(ignored))
    narrow = fully_shard(net(dtype=torch.bfloat16), mesh=mesh)
    assert "MixedPrecisionPolicy" in raises(NotImplementedError, lambda: newton(narrow))
    across = nn.Sequential(nn.Linear(4, 6, bias=False))
    fully_shard(across, mesh=mesh, shard_placement_fn=lambda p: Shard(1))
    assert "sharded by its inputs" in raises(NotImplementedError, lambda: newton(across))
    whole = fully_shard(net(), mesh=mesh)
    assert "fully_shard" in raises(ValueError, lambda: newton(whole, ranks=BY_ROWS))
    with mock.patch.object(type(mesh), "device_type", "cuda"):  # as if the weights were offloaded
        assert "CPUOffloadPolicy" in raises(NotImplementedError, lambda: newton(whole))
    late = net()
    opt = newton(late)
    fully_shard(late, mesh=mesh)
    said = raises(RuntimeError, lambda: steps(late, opt, *batches(), 1, half_square))
    assert "'0' was sharded after the optimizer was made" in said
    parallel = parallelize_module(net(), mesh, {"0": ColwiseParallel()})
    assert "DTensor" in raises(NotImplementedError, lambda: newton(parallel))
    sharded = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    assert "FSDP1" in raises(NotImplementedError, lambda: newton(sharded))

    opt = newton(DDP(net()))
    said = raises(NotImplementedError, lambda: CapturedStep(opt, lambda x: x))
    assert "CapturedStep captures the step of one process" in said
    assert "mean_over" in raises(ValueError, lambda: newton(DDP(net()), ranks=BY_ROWS))
    assert "mean_over" in raises(ValueError, lambda: RankRule(mean_over="columns"))
    assert "ProcessGroup" in raises(TypeError, lambda: newton(net(), process_group="gloo"))


class Counter:
    """Counts the numbers that a collective is given."""

    def __init__(self, collective: str = "all_reduce") -> None:
        self._name, self._before, self.sizes = collective, getattr(dist, collective), []

    def __enter__(self):
        def counted(tensor, *args, **kwargs):
            self.sizes.append(tensor.numel())
            return self._before(tensor, *args, **kwargs)

        setattr(dist, self._name, counted)
        return self

    def __exit__(self, *_):
        setattr(dist, self._name, self._before)


def bytes_sent(world: World) -> None:
    """Two vectors a step, of the length that docs/distributed.md gives; none in a group of one."""
    x, y = batches()
    wrapped = DDP(net())
    for action in ("ema", "minibatch"):
        opt = newton(wrapped, hessian_action=action)
        steps(wrapped, opt, x, y, 1, half_square)
        with Counter() as counter:
            steps(wrapped, opt, x, y, 3, half_square)
        numbers = sum(2 * layer.n_a + layer.n_g + 3 for layer in opt.layers) + 6
        numbers += len(list(wrapped.parameters()))
        assert counter.sizes == [numbers] * 6
    alone = [dist.new_group([r]) for r in range(world.size)][world.rank]
    for opt_of in (
        lambda m: newton(m, process_group=alone),
        lambda m: newton(DDP(m, process_group=alone)),
    ):
        model = net()
        opt = opt_of(model)
        assert opt.steps.process.alone
        with Counter() as counter:
            steps(model, opt, x, y, 3, half_square)
        assert not counter.sizes
    model = DDP(net(), process_group=alone)
    steps(model, newton(model), x, y, 3, half_square)
