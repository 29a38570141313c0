"""One setting for many tasks, by steps: ``python -m benchmarks.tasks``.

K-BFGS as its constructor makes it, against optimizers that are tuned for every task: seed 0 runs
each learning rate of the grid to the end, and the one of the lowest training loss runs with the
other seeds. All follow a cosine to 0. A run is a row, which is not made again where it is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.progress import REFRESH
from benchmarks.summary import point_text, read_rows
from benchmarks.tasks.optimizers import GRIDS, Point, missing
from benchmarks.tasks.runs import IDENTITY, TASKS, best, final, of, run
from kbfgs_ext.bench.environment import ROOT
from kbfgs_ext.bench.measure import store

OUT = ROOT / "benchmarks" / "results" / "tasks.jsonl"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    made.add_argument("--optimizers", nargs="+", choices=GRIDS, default=list(GRIDS))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    made.add_argument("--steps", type=int, help="of a run, default the task's")
    made.add_argument(
        "--loss-scale", type=float, default=1.0, help="multiplies what the optimizer sees"
    )
    made.add_argument("--threads", type=int, default=1, help="CPU threads")
    made.add_argument("--again", action="store_true", help="make rows again that are there")
    made.add_argument("--out", type=Path, default=OUT, help="the rows' file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    asked = parser().parse_args(argv)
    console = Console(stderr=True)
    torch.set_num_threads(asked.threads)

    def made(task: str, name: str, point: Point, seed: int) -> None:
        steps = asked.steps or TASKS[task].steps
        wanted = dict(zip(IDENTITY, (task, name, point_text(point), seed, steps), strict=False))
        wanted["loss_scale"] = asked.loss_scale
        there = [r for r in read_rows(asked.out) if all(r[k] == v for k, v in wanted.items())]
        if there and not asked.again:
            return
        row = run(task, name, point, seed, steps, asked.loss_scale)
        store(asked.out, [row], IDENTITY)
        _, train, test, seconds = row["curve"][-1]
        console.print(
            f"{task} {name} {row['setting']} seed {seed}: {train} / {test}, {seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )

    pairs = [(task, name) for task in asked.tasks for name in asked.optimizers]
    for task, name in track(pairs, "tasks", console=console, refresh_per_second=REFRESH):
        if (reason := missing(name, TASKS[task])) is not None:
            console.print(f"{task} {name}: left out, {reason}", highlight=False, soft_wrap=True)
            continue
        if 0 in asked.seeds:
            for point in GRIDS[name]:
                made(task, name, point, 0)
        chosen = best(of(read_rows(asked.out), task, name))
        point = min(chosen, key=final)["point"] if chosen else GRIDS[name][0]
        for seed in asked.seeds:
            made(task, name, point, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
