"""Cases of several processes, for ranks.py: each takes the `World` and raises what is wrong."""

from __future__ import annotations

import contextlib
import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext import KBFGS, KBFGSL, CapturedStep, presets
from kbfgs_ext.optim.safeguard import SafeguardRule
from tests.optim.models import mlp, rows
from tests.optim.models import snapshot as tensors_of
from tests.optim.ranks import World, batches, compare, half_square, steps


def of(method=KBFGS, **fixed):
    """Makes an optimizer with these options."""
    return lambda model, **options: method(model, **{**fixed, **options})


def net(**options) -> nn.Sequential:
    return mlp(5, 7, 6, 3, **options)


# ---------------------------------------------------------------------- one process's trajectory


def defaults(world: World) -> None:
    compare(world, net(), of())


def ema(world: World) -> None:
    compare(world, net(), of(hessian_action="ema"), but=(" A",))


def published(world: World) -> None:
    compare(world, net(), of(**presets.PUBLISHED), but=(" A",))


def tuned(world: World) -> None:
    compare(world, net(), of(**presets.TUNED))


def ring_of_pairs(world: World) -> None:
    compare(world, net(), of(KBFGSL, memory=5))
    compare(
        world, net(), of(KBFGSL, memory=5, hessian_action="ema", initial_scale=0.5), but=(" A",)
    )


def steps_undone(world: World) -> None:
    opt = compare(world, net(), of(lr=30.0))
    assert opt.counters()["undone"] > 3


def restarts(world: World) -> None:
    rule = SafeguardRule(smallest=1.0)
    for action in ("ema", "minibatch"):
        for method in (KBFGS, KBFGSL):
            make = of(method, lr=50.0, safeguard=rule, restart_after=2, hessian_action=action)
            opt = compare(world, net(), make, but=(" A",), number=20)
            assert opt.counters()["restarts"] > 1


def without_bias(world: World) -> None:
    compare(world, net(bias=False), of())
    compare(world, net(bias=False), of(hessian_action="ema"), plain=True, but=(" A",))


def norms_in_the_fallback(world: World) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    fallback = {"fallback": lambda p: torch.optim.AdamW(p, lr=0.02)}
    compare(world, model, of(lr=10.0, **fallback))
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    compare(world, model, of(lr=10.0, **fallback), plain=True)


def all_averaged(*arguments: Any) -> list[torch.Tensor]:
    """As `in_parts`, and DDP averages after every part."""
    return in_parts(*arguments, quietly=False)


def in_parts(
    model: nn.Module, opt: Any, x, y, number: int, loss_of, quietly: bool = True
) -> list[torch.Tensor]:
    """As `steps`, through the batch in three parts of different sizes."""
    cuts = [0, len(x) // 4, len(x) // 2, len(x)]

    def closure() -> torch.Tensor:
        opt.zero_grad()
        whole = torch.zeros((), dtype=x.dtype)
        for i in range(3):
            part = slice(cuts[i], cuts[i + 1])
            quiet = (
                model.no_sync()
                if quietly and isinstance(model, DDP) and i < 2
                else contextlib.nullcontext()
            )
            with quiet:
                loss = loss_of(model, x[part], y[part]) * len(x[part]) / len(x)
                loss.backward()
            whole += loss.detach()
        return whole

    return [opt.step(closure) for _ in range(number)]


def accumulation(world: World) -> None:
    compare(world, net(), of(), train=in_parts)
    view = {"gradient_as_bucket_view": True}
    compare(world, net(), of(), train=all_averaged, number=15)
    compare(world, net(), of(), train=all_averaged, number=15, wrap=view)
    compare(world, net(), of(hessian_action="ema"), train=in_parts, plain=True, but=(" A",))


def clipping(world: World) -> None:
    compare(world, net(), of(max_grad_norm=0.3, weight_decay=1e-2))


def fewer_passes(world: World) -> None:
    for action in ("ema", "minibatch"):
        make = of(pair_every=3, factor_every=2, hessian_action=action)
        compare(world, net(), make, but=(" A",))
    compare(world, net(), of(pair_every=2), plain=True, number=15)


def other_factors(world: World) -> None:
    compare(world, net(), of(max_factor_dim=6, step_length="layer", lr=0.05))
    groups = lambda model: [{"params": list(model.modules())[1], "lr": 0.1}]  # noqa: E731
    inside = lambda model: model.module if isinstance(model, DDP) else model  # noqa: E731
    compare(world, net(), lambda model, **o: KBFGS(model, groups=groups(inside(model)), **o))


def full_second_pass(world: World) -> None:
    compare(world, net(), of(freeze_second_pass=False))
    compare(world, net(), of(freeze_second_pass=False), plain=True, number=15)


def kinds_of_ddp(world: World) -> None:
    compare(world, net(), of(), wrap={"gradient_as_bucket_view": True}, number=15)
    compare(world, net(), of(), wrap={"static_graph": True}, number=15)
    compare(world, net(), of(), wrap={"find_unused_parameters": True}, number=15)
    small = {"bucket_cap_mb": 0.0001, "gradient_as_bucket_view": True}
    compare(world, net(), of(), wrap=small, number=15)


def four_calls(model: nn.Module, opt: Any, x, y, number: int, loss_of) -> list[torch.Tensor]:
    """As `steps`, without a closure."""
    losses = []
    for _ in range(number):
        with opt.first_pass():
            opt.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
        opt.descend(loss)
        with opt.second_pass():
            again = loss_of(model, x, y)
            again.backward()
        opt.finish(again)
        losses.append(loss.detach())
    return losses


def scaled(model: nn.Module, opt: Any, x, y, number: int, loss_of) -> list[torch.Tensor]:
    """As `steps`, with a scaler that overflows in the third step."""
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for step in range(number):

        def closure(step=step) -> torch.Tensor:
            opt.zero_grad()
            loss = loss_of(model, x, y)
            scaler.scale(loss).backward()
            gradient = opt.layers[0].weight.grad  # None in the second pass
            if step == 2 and dist.get_rank() == 0 and gradient is not None:
                gradient.fill_(float("inf"))
            return loss

        losses.append(opt.step(closure, scaler=scaler).detach())
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    return losses


def other_loops(world: World) -> None:
    compare(world, net(), of(), train=four_calls)
    opt = compare(world, net(), of(), train=scaled, plain=True)
    assert opt.counters()["skipped"] == 1


class ByHand(nn.Module):
    """One layer whose weight is used without a call, one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3, bias=False)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(nn.functional.linear(x, self.a.weight, self.a.bias))
        return self.c(torch.tanh(self.b(torch.tanh(self.b(h)))))


def weights_used_by_hand(world: World) -> None:
    for plain in (False, True):
        compare(world, ByHand(), of(), number=15, plain=plain)


def narrow_dtypes(world: World) -> None:
    """float32, and autocast, to their rounding."""

    def autocast(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x.float())
        return (out.float() - y.float()).square().sum() / (2 * len(x))

    def single(model, x, y):
        return half_square(model, x.float(), y.float())

    compare(world, net(dtype=torch.float32), of(), loss_of=single, number=10, close=1e-4)
    compare(world, net(dtype=torch.float32), of(), loss_of=autocast, number=10, close=2e-2)
    compare(world, net(dtype=torch.bfloat16), of(), loss_of=autocast, number=3, close=5e-2)


# ---------------------------------------------------------------------- unequal ranks


def plain_model(world: World) -> None:
    """Without DDP; all ranks take rank 0's weights at the start."""
    torch.manual_seed(world.rank)
    compare(world, net(), of(), plain=True)


def unequal_batches(world: World) -> None:
    """With DDP the loss is scaled, by r*m_r/m; without, the rows count."""

    def scaled_loss(model, x, y):
        share = world.size * len(x) / len(batches()[0])
        return half_square(model, x, y) * share

    for action in ("ema", "minibatch"):
        make = of(hessian_action=action)
        rest = dict(unequal=True, but=(" A",))
        compare(world, net(), make, loss_of=scaled_loss, whole_loss=half_square, **rest)
        compare(world, net(), make, plain=True, mean_over="rows", **rest)  # type: ignore[arg-type]


def empty_batch(world: World) -> None:
    """One rank has no rows: with DDP a sum over them, of 0; without, even a mean, of NaN."""
    x, y = batches()
    last = world.rank == world.size - 1

    def run(make, plain: bool, **options):
        torch.manual_seed(1)
        model = net()
        twin = net()
        twin.load_state_dict(model.state_dict())
        shares = [slice(8 * i, 8 * i + 8) for i in range(world.size - 1)] + [slice(0, 0)]
        m = 8 * (world.size - 1)
        mine = shares[world.rank]

        def total(model, x, y):
            return (model(x) - y).square().sum() * (world.size / (2 * m))

        if plain:
            opt = make(model, process_group=dist.group.WORLD, mean_over="rows", **options)
            losses = steps(model, opt, x[mine], y[mine], 20, half_square)
            assert not last or losses[0].isnan()
        else:
            wrapped = DDP(model)
            opt = make(wrapped, **options)
            losses = steps(wrapped, opt, x[mine], y[mine], 20, total)
        kept = {k: t for k, t in tensors_of(model, opt).items() if not k.endswith(" A")}
        world.same_bits(kept)
        losses = [torch.zeros_like(v) for v in losses] if last else losses
        got = world.mean(losses) * (world.size / (world.size - 1) if plain else 1)
        if world.rank == 0:
            wanted = steps(twin, make(twin), x[:m], y[:m], 20, half_square)
            torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-10, atol=1e-10)

    for action in ("ema", "minibatch"):
        run(of(hessian_action=action), plain=False)
        run(of(hessian_action=action), plain=True)


class Branches(nn.Module):
    """Two layers side by side, and one behind; ``use`` says which of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)
        self.double()

    def forward(self, x: torch.Tensor, use: str = "ab") -> torch.Tensor:
        return self.out(torch.tanh(sum(getattr(self, name)(x) for name in use)))


def layers_of_one_rank(world: World) -> None:
    """A layer that only one rank uses, in some steps, moves on all."""
    x, y = batches()
    mine = world.slices()
    for plain in (True, False):
        torch.manual_seed(0)
        model, twin = Branches(), Branches()
        twin.load_state_dict(model.state_dict())
        run: nn.Module = model
        if plain:
            opt = KBFGS(model, process_group=dist.group.WORLD)
        else:
            run = DDP(model, find_unused_parameters=True)
            opt = KBFGS(run)
        got = []
        for step in range(12):
            use = "a" if world.rank == 0 else ("a", "ab", "b")[step % 3]
            got += steps(
                run, opt, x[mine], y[mine], 1, lambda m, *b, u=use: half_square(Of(m, u), *b)
            )
        world.same_bits(tensors_of(model, opt))
        losses = world.mean(got)
        if world.rank == 0:
            one, wanted, cut = KBFGS(twin), [], len(x) // world.size
            for step in range(12):
                use = ("a", "ab", "b")[step % 3]

                def loss_of(m, x, y, use=use, cut=cut):
                    first = half_square(Of(m, "a"), x[:cut], y[:cut])
                    return (first + half_square(Of(m, use), x[cut:], y[cut:])) / 2

                wanted += steps(twin, one, x, y, 1, loss_of)
            torch.testing.assert_close(losses, torch.stack(wanted), rtol=1e-10, atol=1e-10)


class Of:
    """A model of `Branches` with its argument."""

    def __init__(self, model: nn.Module, use: str) -> None:
        self.model, self.use = model, use

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, self.use)


def random_numbers_and_buffers(world: World) -> None:
    """Dropout and BatchNorm are each rank's own, as with DDP; the weights are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)
    ).double()
    wrapped = DDP(model)
    opt = KBFGS(wrapped)
    x, y = batches()
    torch.manual_seed(world.rank)
    steps(wrapped, opt, x[world.slices()], y[world.slices()], 5, half_square)
    world.same_bits(tensors_of(model, opt))
    assert model[1].num_batches_tracked == 5
    wrapped(x)  # sends rank 0's buffers, as in every first pass
    assert wrapped.require_forward_param_sync


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
        opt = KBFGS(wrapped, hessian_action=action)
        opt.warm_start(theirs[world.rank])
        x, y = batches()
        mine = world.slices()
        got = world.mean(steps(wrapped, opt, x[mine], y[mine], 10, half_square))
        world.same_bits({k: t for k, t in tensors_of(model, opt).items() if not k.endswith(" A")})
        if world.rank == 0:
            one = KBFGS(twin, hessian_action=action)
            one.warm_start(data)
            wanted = torch.stack(steps(twin, one, x, y, 10, half_square))
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        bad = KBFGS(DDP(net()), hessian_action=action)
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
    said = raises(kind, lambda: KBFGS(DDP(net())).warm_start(broken()))
    assert world.rank == 1 or said == "rank 1 failed with OSError: no such file"


def resume(world: World) -> None:
    """What one rank saves, all load, and go on bit for bit; each rank's own A is said to be so."""
    x, y = batches()
    mine = world.slices()
    for action in ("minibatch", "ema"):
        torch.manual_seed(0)
        model = net()
        wrapped = DDP(model)
        opt = KBFGS(wrapped, hessian_action=action)
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
        resumed = KBFGS(again, hessian_action=action)
        fresh.load_state_dict(saved[0][0])
        resumed.load_state_dict(saved[0][1])
        a = steps(wrapped, opt, x[mine], y[mine], 6, half_square)
        b = steps(again, resumed, x[mine], y[mine], 6, half_square)
        assert a == b
        if world.rank == 0:  # one process goes on with it as well
            alone = net()
            one = KBFGS(alone, hessian_action=action)
            alone.load_state_dict(saved[0][0])
            one.load_state_dict(saved[0][1])
            wanted = torch.stack(steps(alone, one, x, y, 6, half_square))
        got = world.mean(a)
        if world.rank == 0:
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        opt.restart()
        steps(wrapped, opt, x[mine], y[mine], 3, half_square)
        world.same_bits({k: t for k, t in tensors_of(model, opt).items() if not k.endswith(" A")})


# ---------------------------------------------------------------------- what goes wrong


def raises(kind: type[BaseException], call) -> str:
    """The message of the error that ``call`` raises."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


def not_finite_on_one_rank(world: World) -> None:
    """A NaN in the first pass of one rank voids the step on all; one in the second undoes it."""
    x, y = batches()
    mine = world.slices()
    for plain in (False, True):
        model = net()
        run: nn.Module = model if plain else DDP(model)
        opt = KBFGS(run, process_group=dist.group.WORLD)
        steps(run, opt, x[mine], y[mine], 3, half_square)
        before = {name: p.clone() for name, p in model.named_parameters()}
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
        model = net()
        run: nn.Module = model if plain else DDP(model)
        opt = KBFGS(run, process_group=dist.group.WORLD)
        steps(run, opt, x[mine], y[mine], 3, half_square)
        before = {name: p.clone() for name, p in model.named_parameters()}
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


def ranks_out_of_step(world: World) -> None:
    model = net()
    opt = KBFGS(model, process_group=dist.group.WORLD)
    x, y = batches()
    steps(model, opt, x, y, 2, half_square)
    opt.steps.number += world.rank
    said = raises(RuntimeError, lambda: steps(model, opt, x, y, 1, half_square))
    assert "the ranks are not in the same place" in said


def optimizer_of_the_bare_model(world: World) -> None:
    """With DDP around the model that is an error, and with the group as well it is not."""
    model = net()
    wrapped = DDP(model)
    x, y = batches()
    opt = KBFGS(model)
    said = raises(RuntimeError, lambda: steps(wrapped, opt, x, y, 1, half_square))
    assert "KBFGS(ddp_model)" in said
    steps(model, KBFGS(model), x, y, 1, half_square)  # processes that have nothing to do together
    group = dist.group.WORLD
    compare(world, net(), lambda m, **o: KBFGS(getattr(m, "module", m), **o), process_group=group)
    compare(world, net(), lambda m, **o: KBFGS(torch.compile(m, backend="eager"), **o), number=3)


def refusals(world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world.size,))
    said = raises(NotImplementedError, lambda: KBFGS(fully_shard(net(), mesh=mesh)))
    assert "fully_shard (FSDP2)" in said and "DistributedDataParallel" in said
    parallel = parallelize_module(net(), mesh, {"0": ColwiseParallel()})
    assert "DTensor" in raises(NotImplementedError, lambda: KBFGS(parallel))
    sharded = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    assert "FSDP1" in raises(NotImplementedError, lambda: KBFGS(sharded))

    opt = KBFGS(DDP(net()))
    said = raises(NotImplementedError, lambda: CapturedStep(opt, lambda x: x))
    assert "CapturedStep captures the step of one process" in said
    assert "mean_over" in raises(ValueError, lambda: KBFGS(DDP(net()), mean_over="rows"))
    assert "mean_over" in raises(ValueError, lambda: KBFGS(net(), mean_over="columns"))
    assert "ProcessGroup" in raises(TypeError, lambda: KBFGS(net(), process_group="gloo"))


class Counter:
    """Counts the numbers that all_reduce is given."""

    def __enter__(self):
        self.sizes, self._before = [], dist.all_reduce

        def counted(tensor, *args, **kwargs):
            self.sizes.append(tensor.numel())
            return self._before(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_):
        dist.all_reduce = self._before


def bytes_sent(world: World) -> None:
    """Two vectors a step, of the length that docs/distributed.md gives; none in a group of one."""
    x, y = batches()
    wrapped = DDP(net())
    for action in ("ema", "minibatch"):
        opt = KBFGS(wrapped, hessian_action=action)
        steps(wrapped, opt, x, y, 1, half_square)
        with Counter() as counter:
            steps(wrapped, opt, x, y, 3, half_square)
        numbers = sum(2 * layer.n_a + layer.n_g + 3 for layer in opt.layers) + 5
        numbers += len(list(wrapped.parameters()))
        assert counter.sizes == [numbers] * 6
    alone = [dist.new_group([r]) for r in range(world.size)][world.rank]
    for opt_of in (
        lambda m: KBFGS(m, process_group=alone),
        lambda m: KBFGS(DDP(m, process_group=alone)),
    ):
        model = net()
        opt = opt_of(model)
        assert opt.steps.process.alone
        with Counter() as counter:
            steps(model, opt, x, y, 3, half_square)
        assert not counter.sizes
    model = DDP(net(), process_group=alone)
    steps(model, KBFGS(model), x, y, 3, half_square)


def last(world: World) -> None:
    """A rank ends in the middle of a step: the others learn of it."""
    model = net()
    opt = KBFGS(model, process_group=dist.group.WORLD)
    x, y = batches()
    steps(model, opt, x, y, 1, half_square)
    if world.rank == world.size - 1:
        os._exit(0)
    said = raises(RuntimeError, lambda: steps(model, opt, x, y, 1, half_square))
    assert "not all of them come" in said
