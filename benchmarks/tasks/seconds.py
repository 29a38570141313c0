"""The same tasks by seconds: ``python -m benchmarks.tasks.seconds``.

How long a step takes is read in turns, in seconds of the processor, and K-BFGS gets as many steps
as fit into the whole run of the other, on a cosine of their own. What the other has reached is a
row of ``benchmarks.tasks``, where its best setting is found.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.progress import REFRESH
from benchmarks.summary import Row, read_rows
from benchmarks.tables import RESULTS, lines_of, machine, markdown
from benchmarks.tasks.optimizers import GRIDS, LABELS, Point, build
from benchmarks.tasks.runs import TASKS, best, closure_of, final, of, run, spread, text
from kbfgs_ext.bench.measure import store
from kbfgs_ext.optim.settings import Settings

OUT = RESULTS / "tasks_seconds.jsonl"
RIVALS = ("adamw", "muon")
IDENTITY = ("task", "rival", "seed")
ROUNDS = 3  # of pair_every steps each, after one that makes state


def step_seconds(task: str, points: dict[str, Point]) -> dict[str, float]:
    """A step of each optimizer, the median of the rounds, which take turns."""
    every = Settings.pair_every
    taken: dict[str, list[float]] = {name: [] for name in points}
    runners = {}
    for name, point in points.items():
        made = TASKS[task](0)
        runners[name] = build(name, made, point), made.batches()
    for _ in range(1 + ROUNDS):
        for name, (opt, batches) in runners.items():
            losses = [next(batches) for _ in range(every)]
            begun = time.process_time()
            for loss in losses:
                opt.step(closure_of(opt, loss))
            taken[name].append((time.process_time() - begun) / every)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def table() -> str:
    """Per task and rival: a step of both, and what each has reached when the seconds are spent."""
    rows, others = lines_of("tasks_seconds"), lines_of("tasks")
    heads = ["task", "against", "ms a step, theirs", "ours", "steps, theirs", "ours", "seeds"]
    heads += ["train, theirs", "ours", "test, theirs", "ours"]
    body, places = [], {}
    for task, kind in TASKS.items():
        for rival in RIVALS:
            mine = [row for row in rows if (row["task"], row["rival"]) == (task, rival)]
            theirs = best(of(others, task, rival))
            if not mine or not theirs:
                continue
            cost = [f"{1000 * mine[0][key]:.3g}" for key in ("rival_seconds", "step_seconds")]
            reached = [text(spread(r, k)) for k in ("train", "test") for r in (theirs, mine)]
            steps = [str(kind.steps), str(mine[0]["steps"])]
            body.append([kind.title, LABELS[rival], *cost, *steps, str(len(mine)), *reached])
            places |= dict.fromkeys(machine(row) for row in mine)
    return markdown(heads, body) + "".join(f"\n{place}.\n" for place in places)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks.seconds", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=Path, default=RESULTS / "tasks.jsonl", help="of the others")
    parser.add_argument("--out", type=Path, default=OUT, help="the rows' file")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)  # a processor's seconds are then those of the run
    console = Console(stderr=True)
    for task in track(asked.tasks, "tasks", console=console, refresh_per_second=REFRESH):
        chosen = {name: best(of(read_rows(asked.rows), task, name)) for name in RIVALS}
        points = {name: min(runs, key=final)["point"] for name, runs in chosen.items() if runs}
        seconds = step_seconds(task, points | {"kbfgs": GRIDS["kbfgs"][0]})
        for rival in points:
            steps = max(1, round(TASKS[task].steps * seconds[rival] / seconds["kbfgs"]))
            rows: list[Row] = []
            for seed in asked.seeds:
                row = run(task, "kbfgs", GRIDS["kbfgs"][0], seed, steps)
                cost = {"rival_seconds": seconds[rival], "step_seconds": seconds["kbfgs"]}
                rows.append(row | {"rival": rival} | cost)
            store(asked.out, rows, IDENTITY)
            console.print(
                f"{task}: as long as {rival}, {steps} steps: {text(spread(rows))}",
                highlight=False,
                soft_wrap=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
