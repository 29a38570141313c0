"""One setting at other scales and widths: ``python -m benchmarks.tasks.transfer``.

The defaults with the loss and what the network sees multiplied by constants, and learning rates on
a classifier of several widths.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.progress import REFRESH
from benchmarks.summary import Row, read_rows
from benchmarks.tables import RESULTS, lines_of, machine, markdown
from benchmarks.tasks.problems import Characters, Classifier, Task
from benchmarks.tasks.runs import TASKS, run, spread, text
from kbfgs_ext.bench.measure import store

OUT = RESULTS / "tasks_transfer.jsonl"
LOSSES, INPUTS = (0.01, 1.0, 100.0), (0.1, 1.0, 10.0)
SCALED = ("classifier", "patches", "characters")
WIDTHS, RATES = (256, 512, 1024, 2048), (0.0125, 0.025, 0.05, 0.1, 0.2)
IDENTITY = ("task", "setting", "seed", "loss_scale", "input_scale", "width")


def scaled(name: str, factor: float, seed: int) -> Task:
    """The task with all that its network sees multiplied: pixels, or embeddings."""
    task = TASKS[name](seed)
    if isinstance(task, Classifier):
        task.train, task.test = ((x * factor, y) for x, y in (task.train, task.test))
    elif isinstance(task, Characters):
        task.model.blocks.register_forward_pre_hook(lambda module, args: (args[0] * factor,))
    return task


def wide(width: int, seed: int) -> Task:
    """The classifier with hidden layers of that width."""
    return type("Wide", (Classifier,), {"width": width})(seed)


def runs(seeds: Sequence[int]) -> Iterator[tuple[str, dict[str, float], int, float, float, int]]:
    """Task, options, seed, scale of the loss, of the inputs, and width."""
    scales = [(loss, 1.0) for loss in LOSSES] + [(1.0, x) for x in INPUTS if x != 1]
    for seed, name, (loss, inputs) in itertools.product(seeds, SCALED, scales):
        yield name, {}, seed, loss, inputs, Classifier.width
    for seed, width, rate in itertools.product(seeds, WIDTHS, RATES):
        yield "classifier", {"lr": rate}, seed, 1.0, 1.0, width


def scales() -> str:
    """Losses at the end, as they are without the factors, by what is multiplied."""
    rows = [row for row in lines_of("tasks_transfer") if not row["point"]]
    kinds = [(loss, 1.0) for loss in LOSSES] + [(1.0, x) for x in INPUTS if x != 1]
    heads = ["task", "loss", *(f"loss x {a:g}" if b == 1 else f"inputs x {b:g}" for a, b in kinds)]
    body = []
    for name, key in itertools.product(SCALED, ("train", "test")):
        mine = [row for row in rows if row["task"] == name]
        of = [[r for r in mine if (r["loss_scale"], r["input_scale"]) == kind] for kind in kinds]
        if all(of):
            body.append([TASKS[name].title, key, *(text(spread(some, key)) for some in of)])
    return markdown(heads, body) + places(rows)


def widths() -> str:
    """Training loss at the end by width and learning rate; the lowest of a width is bold."""
    rows = [row for row in lines_of("tasks_transfer") if row["point"]]
    body = []
    head = ["width", "seeds", *(f"lr {x:g}" for x in RATES)]
    for width in WIDTHS:
        mine = [row for row in rows if row["width"] == width]
        ends = {x: spread([r for r in mine if r["point"]["lr"] == x]) for x in RATES if mine}
        best = min(ends, key=lambda x: ends[x].median) if ends else None
        cells = [f"**{text(end)}**" if x == best else text(end) for x, end in ends.items()]
        body += [[str(width), str(len({row["seed"] for row in mine})), *cells]] if cells else []
    return markdown(head, body) + places(rows)


def places(rows: Sequence[Row]) -> str:
    """Where they were made."""
    seeds = sorted({row["seed"] for row in rows})
    made = dict.fromkeys(machine(row) for row in rows)
    return f"\nSeeds {', '.join(map(str, seeds))}; " + "; ".join(made) + ".\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    command = "python -m benchmarks.tasks.transfer"
    parser = argparse.ArgumentParser(prog=command, description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of a run, default the task's")
    parser.add_argument("--most", type=int, help="leave wider networks out")
    parser.add_argument("--out", type=Path, default=OUT, help="the rows' file")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    wanted = [one for one in runs(asked.seeds) if asked.most is None or one[-1] <= asked.most]
    for name, point, seed, loss, inputs, width in track(
        wanted, "runs", console=Console(stderr=True), refresh_per_second=REFRESH
    ):
        about = {"input_scale": inputs, "width": width}
        same = {"task": name, "point": point, "seed": seed, "loss_scale": loss, **about}
        if any(all(row[k] == v for k, v in same.items()) for row in read_rows(asked.out)):
            continue
        make = functools.partial(wide, width) if point else functools.partial(scaled, name, inputs)
        row = run(name, "kbfgs", point, seed, asked.steps, loss, make)
        store(asked.out, [row | about], IDENTITY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
