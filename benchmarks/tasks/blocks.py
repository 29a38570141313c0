"""What the size of the factors' blocks makes of a run: ``python -m benchmarks.tasks.blocks``.

The default's runs are rows of ``benchmarks.tasks``; those of other sizes are made here.
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
from benchmarks.tables import RESULTS, lines_of, machine, markdown
from benchmarks.tasks.runs import TASKS, of, run, spread, text
from kbfgs_ext.bench.measure import store
from kbfgs_ext.optim.settings import LARGE_BLOCK, SMALL_BLOCK

OUT = RESULTS / "tasks_blocks.jsonl"
SIZES = (128, LARGE_BLOCK)
WIDE = ("autoencoder", "characters", "characters-128")  # tasks with sides above the default
IDENTITY = ("task", "setting", "seed")


def table() -> str:
    """Per task the loss at the end, with every size."""
    rows, defaults = lines_of("tasks_blocks"), lines_of("tasks")
    heads = ["task", "loss", "seeds", *map(str, sorted({*SIZES, SMALL_BLOCK}))]
    body, places = [], {}
    for task in WIDE:
        mine = [row for row in rows if row["task"] == task]
        if not mine:
            continue
        seeds = {row["seed"] for row in mine}
        runs = {size: [r for r in mine if r["point"]["block_size"] == size] for size in SIZES}
        runs[SMALL_BLOCK] = [r for r in of(defaults, task, "kbfgs") if r["seed"] in seeds]
        for key in ("train", "test"):
            cells = [text(spread(runs[size], key)) for size in sorted(runs)]
            body.append([TASKS[task].title, key, str(len(seeds)), *cells])
        places |= dict.fromkeys(machine(row) for rows in runs.values() for row in rows)
    return markdown(heads, body) + "".join(f"\n{place}.\n" for place in places)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks.blocks", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=WIDE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of a run, default the task's")
    parser.add_argument("--out", type=Path, default=OUT, help="the rows' file")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(stderr=True)
    points = [(task, size, seed) for task in asked.tasks for size in SIZES for seed in asked.seeds]
    for task, size, seed in track(points, "runs", console=console, refresh_per_second=REFRESH):
        row = run(task, "kbfgs", {"block_size": size}, seed, asked.steps)
        store(asked.out, [row], IDENTITY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
