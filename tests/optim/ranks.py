"""One of several processes that run the cases of distributed_cases.py and its like:

    python -m tests.optim.ranks RANK DIRECTORY PLAN BACKEND DEVICE

Every case runs in all processes at once; what each has to say of it goes to DIRECTORY/RANK.json.
"""

from __future__ import annotations

import copy
import datetime
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext import RankRule
from tests.optim.models import rows
from tests.optim.models import snapshot as tensors_of

TIMEOUT = datetime.timedelta(seconds=100)
BATCH = 24  # rows of all ranks together
BY_ROWS, SHARED = RankRule(mean_over="rows"), RankRule(shared_work=True)
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def half_square(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Half squared error, summed over features, mean over the batch."""
    return (model(x) - y).square().sum() / (2 * x.shape[0])


class World:
    """The processes, and which of them this is."""

    def __init__(self, rank: int, size: int, directory: Path) -> None:
        self.rank, self.size, self.directory = rank, size, directory

    def some(self, cases: Sequence[Any]) -> Sequence[Any]:
        """All of the cases, or of more processes than two the first, which is slower."""
        return cases if self.size == 2 else cases[:1]

    def slices(self, unequal: bool = False) -> slice:
        """The rows of this rank; unequal: rank 0 has half as many again, taken from the last."""
        n = BATCH // self.size
        cuts = [n * i for i in range(self.size + 1)]
        if unequal:
            cuts[1:-1] = [c + n // 2 for c in cuts[1:-1]]
        return slice(cuts[self.rank], cuts[self.rank + 1])

    def same_bits(self, tensors: dict[str, torch.Tensor]) -> None:
        """All ranks have the same ``tensors``."""
        for name, mine in tensors.items():
            theirs = mine.clone().contiguous()
            dist.broadcast(theirs, 0)
            wrong = torch.tensor(float(not torch.equal(theirs, mine)))
            dist.all_reduce(wrong)
            assert not wrong, f"{name} is not the same on all ranks"

    def mean(self, values: list[torch.Tensor], weight: float = 1.0) -> torch.Tensor:
        """Of the ranks' ``values``."""
        both = torch.stack([*values, torch.ones_like(values[0])]).double() * weight
        dist.all_reduce(both)
        return both[:-1] / both[-1]


def steps(
    model: nn.Module, opt: Any, x: torch.Tensor, y: torch.Tensor, number: int, loss_of: Loss
) -> list[torch.Tensor]:
    """Training on one batch; its losses."""

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    return [opt.step(closure).detach() for _ in range(number)]


def whole(t: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor; all ranks call this."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of the whole batch."""
    return rows(BATCH, 5), rows(BATCH, 3, seed=1)


def compare(
    world: World,
    model: nn.Module,
    make: Callable[..., Any],
    *,
    number: int = 40,
    plain: bool = False,
    unequal: bool = False,
    loss_of: Loss = half_square,
    whole_loss: Loss | None = None,
    wrap: dict[str, Any] | None = None,
    shard: Callable[[nn.Module], Any] | None = None,
    train: Callable[..., list[torch.Tensor]] = steps,
    but: tuple[str, ...] = (),
    close: float = 1e-10,
    **options: Any,
) -> Any:
    """Train on all ranks and, on rank 0, in one process on the whole batch: the same losses to
    ``close``, and the same weights to the bit on all ranks; returns the optimizer.

    Args:
        make: makes an optimizer of a model.
        plain: a bare model with a process group, in place of DDP.
        unequal: the ranks have parts of different sizes.
        wrap: options of DDP.
        shard: shards the model, in place of DDP.
        train: as `steps`.
        but: kept tensors that are each rank's own.
        options: of the optimizer of several ranks.
    """
    alone = copy.deepcopy(model)
    x, y = batches()
    mine = world.slices(unequal)
    rule = options.get("ranks", RankRule())
    shared = shard is not None or rule.shared_work
    if shard is not None:
        shard(model)
        opt = make(model, **options)
        losses = train(model, opt, x[mine], y[mine], number, loss_of)
    elif plain:
        opt = make(model, process_group=dist.group.WORLD, **options)
        losses = train(model, opt, x[mine], y[mine], number, loss_of)
    else:
        wrapped = DDP(model, **(wrap or {}))
        opt = make(wrapped, **options)
        losses = train(wrapped, opt, x[mine], y[mine], number, loss_of)
    own = {name: whole(t) for name, t in tensors_of(model, opt).items()}
    alike = {name: t for name, t in own.items() if not shared or name.startswith("param ")}
    world.same_bits({name: t for name, t in alike.items() if not name.endswith(but or ("\0",))})
    world.same_bits({f"counter {name}": t.double() for name, t in opt.counters().items()})
    weight = float(mine.stop - mine.start) if rule.mean_over == "rows" else 1.0
    got = world.mean(losses, weight)
    if world.rank == 0 or shared:
        one = make(alone)
        wanted = torch.stack(train(alone, one, x, y, number, whole_loss or loss_of)).double()
        torch.testing.assert_close(got, wanted, rtol=close, atol=close)
        for name, t in tensors_of(alone, one).items() if close < 1e-6 else ():
            if name in own and not name.endswith(but or ("\0",)):
                torch.testing.assert_close(own[name], t, rtol=1e-6, atol=1e-8, msg=name)
        for name, count in one.counters().items():
            torch.testing.assert_close(opt.counters()[name], count, msg=name)
    return opt


def main(
    rank: int, directory: Path, plan: list[tuple[int, list[str]]], backend: str, device: str
) -> None:
    """Run the plan: numbers of processes, of which this is one or not, and their cases.

    What each rank has to say of each case is "" or a traceback.
    """
    from tests.optim import (
        distributed_cases,
        distributed_failures,
        distributed_kinds,
        distributed_saved,
        distributed_shards,
        distributed_states,
    )

    cases = {}
    modules = distributed_cases, distributed_failures, distributed_kinds, distributed_saved
    for module in (*modules, distributed_shards, distributed_states):
        cases |= vars(module)

    torch.set_num_threads(1)
    torch.set_default_device(device)
    warnings.simplefilter("ignore")
    said = {}
    for i, (size, names) in enumerate(plan):
        if rank >= size:
            continue
        store = dist.FileStore(str(directory / f"store{i}"), size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        world = World(rank, size, directory)
        for name in names:
            torch.manual_seed(0)
            started = time.perf_counter()
            try:
                cases[name](world)
                said[f"{size} {name}"] = ""
            except BaseException:
                said[f"{size} {name}"] = traceback.format_exc()
            print(f"{size} {name}: {time.perf_counter() - started:.1f} s", flush=True)
            (directory / f"{rank}.json").write_text(json.dumps(said))
            if name != "last":
                dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _, own, folder, cases, *where = sys.argv
    main(int(own), Path(folder), json.loads(cases), *where)
