"""Cases of several processes, for ranks.py: one process's trajectory.

Each takes the `World`, and raises what is wrong.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext import KBFGS, KBFGSL, DirectionRule, presets
from kbfgs_ext.optim.safeguard import SafeguardRule
from tests.optim.models import absolute, mlp, newton, newton_l
from tests.optim.models import snapshot as tensors_of
from tests.optim.ranks import BY_ROWS, SHARED, World, batches, compare, half_square, steps


def of(method=newton, **fixed):
    """Makes an optimizer with these options."""
    return lambda model, **options: method(model, **{**fixed, **options})


def net(**options) -> nn.Sequential:
    return mlp(5, 7, 6, 3, **options)


# ---------------------------------------------------------------------- one process's trajectory


def huber(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whose curvature is not the same everywhere: else y = s in the last layer, on the edge of
    what counts as damped."""
    return nn.functional.huber_loss(model(x), y, delta=0.5)


def defaults(world: World) -> None:
    for options in world.some(({}, {"hessian_action": "ema", "pair_every": 2})):
        for method in (KBFGS, KBFGSL):
            compare(world, net(), of(method, **options), loss_of=huber, but=(" A",))
    compare(world, net(), of(KBFGS), plain=True, unequal=True, loss_of=huber, ranks=BY_ROWS)


def paper(world: World) -> None:
    compare(world, net(), of())


def ema(world: World) -> None:
    compare(world, net(), of(hessian_action="ema"), but=(" A",))


def published(world: World) -> None:
    compare(world, net(), of(**presets.PUBLISHED), but=(" A",))


def tuned(world: World) -> None:
    compare(world, net(), of(**presets.TUNED))


def ring_of_pairs(world: World) -> None:
    for options in world.some(
        ({}, {"hessian_action": "ema", "factors": absolute(initial_scale=0.5)})
    ):
        compare(world, net(), of(newton_l, memory=5, **options), but=(" A",))


def steps_undone(world: World) -> None:
    opt = compare(world, net(), of(lr=30.0))
    assert opt.counters()["undone"] > 3


def restarts(world: World) -> None:
    rule = SafeguardRule(smallest=1.0)
    for action in ("ema", "minibatch"):
        for method in (newton, newton_l):
            rules = {"safeguard": rule, "factors": absolute(restart_after=2)}
            make = of(method, lr=50.0, **rules, hessian_action=action)
            opt = compare(world, net(), make, but=(" A",), number=20)
            assert opt.counters()["restarts"] > 1


def without_bias(world: World) -> None:
    compare(world, net(bias=False), of())
    ema = of(hessian_action="ema")
    compare(world, net(bias=False), ema, plain=True, but=(" A",), number=15)


def norms_in_the_fallback(world: World) -> None:
    fallback = {"fallback": lambda p: torch.optim.AdamW(p, lr=0.02)}
    for plain in world.some((False, True)):
        layers = nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
        compare(world, nn.Sequential(*layers).double(), of(lr=10.0, **fallback), plain=plain)


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
    if world.size > 2:
        return
    view = {"gradient_as_bucket_view": True}
    compare(world, net(), of(), train=all_averaged, number=15)
    compare(world, net(), of(), train=all_averaged, number=15, wrap=view)
    ema = of(hessian_action="ema")
    compare(world, net(), ema, train=in_parts, plain=True, but=(" A",), number=15)


def clipping(world: World) -> None:
    compare(world, net(), of(max_grad_norm=0.3, weight_decay=1e-2))


def fewer_passes(world: World) -> None:
    for action in ("ema", "minibatch"):
        make = of(pair_every=3, factors=absolute(update_every=2), hessian_action=action)
        compare(world, net(), make, but=(" A",))
    compare(world, net(), of(pair_every=2), plain=True, number=15)


def other_factors(world: World) -> None:
    direction = DirectionRule("newton", step_length="layer")
    compare(world, net(), of(block_size=6, direction=direction, lr=0.05))
    groups = lambda model: [{"params": list(model.modules())[1], "lr": 0.1}]  # noqa: E731
    inside = lambda model: model.module if isinstance(model, DDP) else model  # noqa: E731
    compare(world, net(), lambda model, **o: newton(model, groups=groups(inside(model)), **o))


def full_second_pass(world: World) -> None:
    full = of(factors=absolute(freeze_second_pass=False))
    compare(world, net(), full)
    compare(world, net(), full, plain=True, number=15)


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
            here = dist.get_rank() == 0 or opt.steps.process.alone
            if step == 2 and here and gradient is not None:
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

    for action in world.some(("minibatch", "ema")):
        make = of(hessian_action=action)
        rest = dict(unequal=True, but=(" A",))
        losses = dict(loss_of=scaled_loss, whole_loss=half_square)
        compare(world, net(), make, **losses, **rest)  # type: ignore[arg-type]
        compare(world, net(), make, plain=True, ranks=BY_ROWS, **rest)  # type: ignore[arg-type]


def empty_batch(world: World) -> None:
    """One rank has no rows: with DDP a sum over them, of 0; without, even a mean, of NaN."""
    x, y = batches()
    last = world.rank == world.size - 1

    def run(make, plain: bool, made=net, **options):
        torch.manual_seed(1)
        model, twin = made(), made()
        twin.load_state_dict(model.state_dict())
        shares = [slice(8 * i, 8 * i + 8) for i in range(world.size - 1)] + [slice(0, 0)]
        m = 8 * (world.size - 1)
        mine = shares[world.rank]

        def total(model, x, y):
            return (model(x) - y).square().sum() * (world.size / (2 * m))

        if plain:
            opt = make(model, process_group=dist.group.WORLD, ranks=BY_ROWS, **options)
            losses = steps(model, opt, x[mine], y[mine], 40, half_square)
            assert not last or losses[0].isnan()
        else:
            wrapped = DDP(model)
            opt = make(wrapped, **options)
            losses = steps(wrapped, opt, x[mine], y[mine], 40, total)
        alike = "param " if "ranks" in options else ""  # the rest is the owners'
        kept = {k: t for k, t in tensors_of(model, opt).items() if not k.endswith(" A")}
        world.same_bits({k: t for k, t in kept.items() if k.startswith(alike)})
        losses = [torch.zeros_like(v) for v in losses] if last else losses
        got = world.mean(losses) * (world.size / (world.size - 1) if plain else 1)
        if world.rank == 0:
            wanted = steps(twin, make(twin), x[:m], y[:m], 40, half_square)
            torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-10, atol=1e-10)

    for action in world.some(("minibatch", "ema")):
        run(of(hessian_action=action), plain=False)
        run(of(hessian_action=action), plain=True)
    run(of(), plain=True, made=between)
    run(of(), plain=False, made=between, ranks=SHARED)


def between() -> nn.Sequential:
    """A convolution between two other layers."""
    return nn.Sequential(
        nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(6, 3),
    ).double()  # fmt: skip


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
            opt = newton(model, process_group=dist.group.WORLD)
        else:
            run = DDP(model, find_unused_parameters=True)
            opt = newton(run)
        got = []
        for step in range(12):
            use = "a" if world.rank == 0 else ("a", "ab", "b")[step % 3]
            got += steps(
                run, opt, x[mine], y[mine], 1, lambda m, *b, u=use: half_square(Of(m, u), *b)
            )
        world.same_bits(tensors_of(model, opt))
        losses = world.mean(got)
        if world.rank == 0:
            one, wanted, cut = newton(twin), [], len(x) // world.size
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
