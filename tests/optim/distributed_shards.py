"""Cases of several processes, for ranks.py: shared work, and models under `fully_shard`."""

from __future__ import annotations

import copy
import functools
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext import KBFGS, KBFGSL, DirectionRule, RankRule
from kbfgs_ext.ops import registry
from kbfgs_ext.optim import owners
from kbfgs_ext.optim.safeguard import SafeguardRule
from tests.optim.distributed_cases import four_calls, huber, net, of, scaled
from tests.optim.distributed_kinds import Attentive
from tests.optim.distributed_states import Counter, broken, raises
from tests.optim.models import BALANCED, absolute, mlp, newton, newton_l, rows
from tests.optim.ranks import SHARED, World, batches, compare, half_square, steps, whole

OWN_A = (" A", " A.0", " A.1")


def images() -> nn.Sequential:
    """Convolutions on rows of 5, as images of 1 x 5: one in groups, which ranks have parts of."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 6, 3, padding=1), nn.Tanh(),
        nn.Conv1d(6, 9, 3, padding=1, groups=3), nn.Tanh(),
        nn.Conv1d(9, 3, 2, stride=2, bias=False), nn.Flatten(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def shared_work(world: World) -> None:
    """Owners of layers, under DDP and without: one process's trajectory."""
    for make in (of(), of(KBFGS), of(KBFGSL, pair_every=2)):
        compare(world, net(), make, loss_of=huber, number=10, ranks=SHARED)
    ema = of(hessian_action="ema", block_size=4)
    compare(world, net(), ema, but=OWN_A, number=10, ranks=SHARED)
    rows = {"plain": True, "unequal": True, "ranks": RankRule("rows", shared_work=True)}
    compare(world, images(), of(KBFGS), number=10, loss_of=huber, **rows)
    gamma = of(newton_l, memory=4, factors=absolute(initial_scale=0.5), direction=BALANCED)
    compare(world, net(), gamma, number=10, ranks=SHARED)


def chosen_by_size(world: World) -> None:
    """By "auto"; who does what, and what sharing spares and sends, is said in every case."""
    group = {"process_group": dist.group.WORLD}
    for sizes, choice in (((5, 7, 6, 3), False), ((1000, 1000, 1000), True)):
        for asked in (False, True, "auto"):
            model = mlp(*sizes, dtype=torch.float32)
            opt = KBFGS(model, ranks=RankRule(shared_work=asked), **group)
            shares = choice if asked == "auto" else asked
            assert opt.steps.process.shares is shares
            said = opt.steps.process.explain()
            does = "work shared by {} ranks" if shares else "all {} ranks do all the work"
            assert said.startswith(does.format(world.size))
            assert "FLOPs a byte" in said and 'shared_work="auto" shares from 1000' in said
            assert not choice or "each is spared 50% of" in said
    assert opt.explain().endswith(said)


def handed_out_in_pieces(world: World) -> None:
    """P of one part is on its way while that of the next is made: the same steps."""
    events, run, broadcast = [], registry.run, dist.broadcast

    def noted(op, backend, call):
        events.append(op)
        run(op, backend, call)

    def sent(*arguments, **keywords):
        events.append("sent")
        return broadcast(*arguments, **keywords)

    with mock.patch.object(owners, "PIECE", 1):
        make = of(KBFGS, block_size=4)
        opt = compare(world, net(), make, loss_of=huber, number=10, ranks=SHARED)
        assert len(opt.steps.parts.of(opt.layers)) == 3
        model = net()
        opt = KBFGS(model, process_group=dist.group.WORLD, ranks=SHARED)
        x, y = batches()
        with mock.patch.object(registry, "run", noted), mock.patch.object(dist, "broadcast", sent):
            steps(model, opt, x, y, 1, half_square)
        order = [event for event in events if event in ("polar_", "sent")]
        own = sum(layer.mine for layer in opt.layers)
        assert order.count("polar_") == own and order.count("sent") == 3
        assert own < 2 or "sent" in order[: order.index("polar_") + 2]
        # Steps that are measured by each other are of one part.
        balanced = KBFGS(
            model,
            process_group=dist.group.WORLD,
            ranks=SHARED,
            direction=DirectionRule(step_length="balanced"),
        )
        assert len(balanced.steps.parts.of(balanced.layers)) == 1


def layer_by_layer(model: nn.Module, **options) -> None:
    """Each layer for itself, and the root."""
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer, **options)
    fully_shard(model, **options)


def at_once(model: nn.Module) -> None:
    """The whole model as one group."""
    fully_shard(model, reshard_after_forward=False)


def kept_whole(model: nn.Module) -> None:
    """Weights stay gathered between forward and backward."""
    layer_by_layer(model, reshard_after_forward=False)


def sharded(world: World) -> None:
    """Layers with fewer rows than there are ranks, or a number of rows that they do not divide."""
    compare(world, net(), of(KBFGS), loss_of=huber, shard=layer_by_layer)
    paper = of(weight_decay=1e-2, max_grad_norm=0.3)
    compare(world, net(), paper, number=20 if world.size == 2 else 6, shard=at_once)


def sharded_hybrid(world: World) -> None:
    """Shards on two ranks, and replicas on two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    rest = {"shard": functools.partial(layer_by_layer, mesh=mesh), "number": 8}
    opt = compare(world, net(), of(KBFGS, pair_every=2), loss_of=huber, **rest)
    assert "shared by 2 ranks" in opt.explain()
    compare(world, net(), of(hessian_action="ema", max_grad_norm=0.3), but=OWN_A, **rest)
    x, y = batches()
    x, y = x[world.slices()], y[world.slices()]
    model = net()
    rest["shard"](model)
    opt = newton(model)
    with broken("descend_", world.rank == 3):
        said = raises(Exception, lambda: steps(model, opt, x, y, 1, half_square))
    assert said == ("no memory" if world.rank == 3 else "rank 3 failed with OSError: no memory")
    steps(model, opt, x, y, 3, half_square)
    world.same_bits({name: whole(p).detach() for name, p in model.named_parameters()})


def sharded_methods(world: World) -> None:
    compare(world, net(), of(), shard=layer_by_layer, number=10)
    rest = {"shard": kept_whole, "loss_of": huber, "number": 10}
    compare(world, net(bias=False), of(KBFGSL, pair_every=3), **rest)
    ema = of(hessian_action="ema", factors=absolute(update_every=2))
    compare(world, net(), ema, shard=at_once, but=OWN_A, number=10)
    opt = compare(world, net(), of(lr=30.0), shard=layer_by_layer, number=20)
    assert opt.counters()["undone"] > 3
    rules = {"safeguard": SafeguardRule(smallest=1.0), "factors": absolute(restart_after=2)}
    again = of(lr=50.0, **rules)
    opt = compare(world, net(), again, shard=at_once, number=10)
    assert opt.counters()["restarts"] > 1
    ring = of(newton_l, memory=4, factors=absolute(initial_scale=0.5), direction=BALANCED)
    compare(world, net(), ring, shard=layer_by_layer, number=10)
    full = of(factors=absolute(freeze_second_pass=False))
    compare(world, net(), full, shard=layer_by_layer, number=10)


def sharded_kinds(world: World) -> None:
    compare(world, images(), of(KBFGS), shard=layer_by_layer, number=10, loss_of=huber)
    compare(world, images(), of(block_size=4), shard=at_once, number=10, loss_of=huber)
    compare(world, Attentive(True).double(), of(lr=0.1), shard=at_once, number=10)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    layer_norm = copy.deepcopy(model)
    compare(world, layer_norm, of(KBFGS), shard=layer_by_layer, number=10, loss_of=huber)
    fallback = {"fallback": lambda p: torch.optim.AdamW(p, lr=0.02)}
    compare(world, model, of(lr=10.0, **fallback), shard=layer_by_layer, number=20)


def in_parts(model: nn.Module, opt, x, y, number: int, loss_of) -> list[torch.Tensor]:
    """As `steps`, in two parts, of which the second sends the gradients of both."""

    def closure() -> torch.Tensor:
        opt.zero_grad()
        total = torch.zeros((), dtype=x.dtype)
        for i, part in enumerate((slice(0, 3), slice(3, len(x)))):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(i == 1)
            loss = loss_of(model, x[part], y[part]) * len(x[part]) / len(x)
            loss.backward()
            total += loss.detach()
        return total

    return [opt.step(closure) for _ in range(number)]


def zeroed(model: nn.Module, opt, x, y, number: int, loss_of) -> list[torch.Tensor]:
    """As `steps`, with gradients that stay where they are."""

    def closure() -> torch.Tensor:
        opt.zero_grad(set_to_none=False)
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    return [opt.step(closure).detach() for _ in range(number)]


def sharded_loops(world: World) -> None:
    for train in (in_parts, zeroed, four_calls):
        compare(world, net(), of(), shard=layer_by_layer, train=train, number=10)
    opt = compare(world, net(), of(), shard=layer_by_layer, train=scaled, number=8)
    assert opt.counters()["skipped"] == 1


def sharded_precision(world: World) -> None:
    """A mixed-precision policy, to its rounding."""

    def shard(model: nn.Module) -> None:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
        layer_by_layer(model, mp_policy=policy)

    def loss_of(model, x, y):
        return (model(x.float()) - y.float()).square().sum() / (2 * len(x))

    single = net(dtype=torch.float32)
    compare(world, single, of(KBFGS), shard=shard, loss_of=loss_of, number=6, close=5e-2)


def sharded_alike(world: World) -> None:
    """A second pass sends no gradients; a NaN on one rank voids the step on all; a closure that
    fails says so; a warm start is all ranks'."""
    x, y = batches()
    mine = world.slices()
    model = net()
    layer_by_layer(model)
    opt = newton(model)
    sent = []

    def looked_at():
        opt.zero_grad()
        loss = half_square(model, x[mine], y[mine])
        loss.backward()
        sent.append([p.grad is not None for p in model.parameters()])
        return loss

    opt.step(looked_at)
    assert sent == [[True] * 6, [False] * 6]
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    bad = x[mine].clone()
    if world.rank == 1:
        bad[0, 0] = float("nan")
    steps(model, opt, bad, y[mine], 1, half_square)
    assert opt.counters()["skipped"] == 1

    def closure():
        opt.zero_grad()
        loss = half_square(model, x[mine], y[mine])
        loss.backward()
        if world.rank == 1:
            raise ValueError("the metric failed")
        return loss

    said = raises(ValueError if world.rank == 1 else RuntimeError, lambda: opt.step(closure))
    assert world.rank == 1 or said == "rank 1 failed with ValueError: the metric failed"
    for name, p in model.named_parameters():
        assert torch.equal(before[name], whole(p)), name
    steps(model, opt, x[mine], y[mine], 2, half_square)

    fresh, twin = net(), net()
    twin.load_state_dict(fresh.state_dict())
    layer_by_layer(fresh)
    warm, one = newton(fresh), newton(twin)
    warm.warm_start([x[mine][:6], x[mine][6:12]])
    n = len(x) // world.size
    one.warm_start([x[r * n :][cut] for r in range(world.size) for cut in (slice(6), slice(6, 12))])
    got = world.mean(steps(fresh, warm, x[mine], y[mine], 5, half_square))
    wanted = torch.stack(steps(twin, one, x, y, 5, half_square))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def memory_falls(world: World) -> None:
    """Factors and momentum are with the owners alone; of sharded weights a rank has its rows."""
    sizes = (5, 7, 6, 6, 6, 6, 7, 6, 3)
    one = KBFGS(mlp(*sizes)).memory_usage()
    for shard in (False, True):
        model = mlp(*sizes)
        if shard:
            layer_by_layer(model)
            opt = KBFGS(model)
        else:
            opt = KBFGS(model, process_group=dist.group.WORLD, ranks=SHARED)
        usage = opt.memory_usage()
        x, y = rows(8, 5), rows(8, 3, seed=1)
        steps(model, opt, x, y, 2, half_square)
        assert opt.memory_usage() == usage
        kept = sum(
            t.numel() * t.element_size() for layer in opt.layers for t in layer.kept.values()
        )
        scratch = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in opt.layers
            for t in layer.scratch.values()
            if t.numel()
        }
        measured = kept + sum(scratch.values()) + opt.steps.parts._product.nbytes
        assert measured == usage["total"], (measured, usage)
        largest = max(8 * (layer.n_a**2 + layer.n_g**2) for layer in opt.layers)
        mine = usage["H_a"] + usage["H_g"]
        everyone = torch.tensor([mine, usage["M"], usage.get("saved", 0)])
        dist.all_reduce(everyone)
        saved = one["M"] if shard else 0
        assert everyone.tolist() == [one["H_a"] + one["H_g"], one["M"], saved]
        assert mine <= (one["H_a"] + one["H_g"]) / world.size + largest
        assert f"work shared by {world.size} ranks" in opt.explain()


def bytes_shared(world: World) -> None:
    """What shared work sends, as docs/distributed.md has it: vectors, and P where it is made by
    one; of sharded weights the gradient's rows to the owner and P's from it."""
    x, y = batches()
    x, y = x[world.slices()], y[world.slices()]
    model, cut = DDP(net()), net()
    layer_by_layer(cut)
    for run, options in ((model, {"ranks": SHARED}), (cut, {})):
        opt = newton(run, pair_every=2, **options)
        steps(run, opt, x, y, 2, half_square)
        with (
            Counter() as vectors,
            Counter("broadcast") as broadcast,
            Counter("all_to_all_single") as swapped,
        ):
            steps(run, opt, x, y, 2, half_square)  # one with a second pass, and one without
        layers, parameters = opt.layers, len(list(run.parameters()))
        numbers = 6 + parameters + sum(2 * a.n_a + a.n_g + 3 for a in layers)
        P = [a.n_g * a.n_a for a in layers]
        if run is model:
            assert vectors.sizes == [numbers] * (3 + 3)
            assert sorted(broadcast.sizes) == sorted(P * 2) and not swapped.sizes
        else:
            assert vectors.sizes == [numbers + parameters] * (4 + 3) and not broadcast.sizes
            received = torch.tensor([float(n) for n in swapped.sizes])
            dist.all_reduce(received)  # of all ranks: gradients, then P with a norm for each layer
            wanted = [sum(P), sum(P) + world.size * len(P)] * 2
            assert received.tolist() == wanted
