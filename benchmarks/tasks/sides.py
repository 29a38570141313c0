"""What either factor brings once a direction is made polar: ``python -m benchmarks.tasks.sides``.

The default takes the factor of a layer's longer side. Runs with both factors, with one of them in
every layer, and with none, which is Muon's direction with a bias in it, an exact polar factor and
lengths by rows. The default's runs are rows of ``benchmarks.tasks``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.progress import REFRESH
from benchmarks.tables import RESULTS, lines_of, machine, markdown
from benchmarks.tasks.runs import TASKS, of, run, spread, text
from kbfgs_ext.bench.measure import store
from kbfgs_ext.optim.factors import ActivationMatrix

OUT = RESULTS / "tasks_sides.jsonl"
IDENTITY = ("task", "sides", "seed")
CHOSEN = ("autoencoder", "classifier", "convolutions", "patches", "characters", "regression")
DEFAULT = "longer side"


def _both(part: Any, M: list, work: list) -> None:
    part.gradient.precondition(part, M, work)


def _gradient(part: Any, M: list, work: list) -> None:
    part.gradient.precondition_rows(part, M, work)


def _neither(part: Any, M: list, work: list) -> None:
    torch._foreach_copy_(part["P"], M)


SIDES = {
    "both": _both,
    "H_a": ActivationMatrix.precondition_columns,
    "H_g": _gradient,
    "neither": _neither,
}


def run_with(task: str, sides: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """A run whose directions have the factors of ``sides``."""

    def equip(opt: Any) -> None:
        opt.steps.direction.precondition = SIDES[sides]

    return run(task, "kbfgs", {}, seed, steps, equip=equip) | {"sides": sides}


def table() -> str:
    """Per task the loss at the end, by the sides whose factors the direction has."""
    rows, defaults = lines_of("tasks_sides"), lines_of("tasks")
    body, places = [], {}
    for task in CHOSEN:
        runs = {s: [r for r in rows if (r["task"], r["sides"]) == (task, s)] for s in SIDES}
        seeds = {row["seed"] for some in runs.values() for row in some}
        if not seeds:
            continue
        runs = {DEFAULT: [r for r in of(defaults, task, "kbfgs") if r["seed"] in seeds]} | runs
        for key in ("train", "test"):
            cells = [text(spread(some, key)) for some in runs.values()]
            body.append([TASKS[task].title, key, str(len(seeds)), *cells])
        places |= dict.fromkeys(machine(row) for some in runs.values() for row in some)
    heads = ["task", "loss", "seeds", DEFAULT, *SIDES]
    return markdown(heads, body) + "".join(f"\n{place}.\n" for place in places)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks.sides", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=CHOSEN)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of a run, default the task's")
    parser.add_argument("--out", type=Path, default=OUT, help="the rows' file")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(stderr=True)
    points = [
        (t, sides, seed) for t in asked.tasks for sides in asked.sides for seed in asked.seeds
    ]
    for task, sides, seed in track(points, "runs", console=console, refresh_per_second=REFRESH):
        store(asked.out, [run_with(task, sides, seed, asked.steps)], IDENTITY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
