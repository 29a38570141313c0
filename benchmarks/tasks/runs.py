"""A run of a task as a row, and what rows of a task say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.optimizers import anneal
from benchmarks.summary import Row, Spread, point_text
from benchmarks.tasks import problems
from benchmarks.tasks.optimizers import GRIDS, OURS, Point, build
from benchmarks.tasks.problems import Task
from benchmarks.tasks.reinforcement import PointMass
from benchmarks.training import counters
from kbfgs_ext.bench.environment import environment

TASKS: dict[str, type[Task]] = {
    "autoencoder": problems.Autoencoder,
    "classifier": problems.Classifier,
    "convolutions": problems.Convolutions,
    "patches": problems.VisionTransformer,
    "characters": problems.Characters,
    "characters-128": problems.MoreCharacters,
    "regression": problems.Regression,
    "ppo": PointMass,
    "poisson": problems.Equation,
}
IDENTITY = ("task", "optimizer", "setting", "seed", "steps", "loss_scale")
PARTS = 8  # evaluations of a run, evenly over its steps


def run(
    name: str,
    optimizer: str,
    point: Point,
    seed: int,
    steps: int | None = None,
    loss_scale: float = 1.0,
    make: Callable[[int], Task] | None = None,
    equip: Callable[[Any], None] = lambda opt: None,
) -> Row:
    """Train with a cosine from the learning rate to 0 and return the row; ``loss_scale`` multiplies
    the loss that the optimizer sees, ``make`` makes the task of a seed in another way, ``equip``
    changes the optimizer before the first step.

    Seconds are a processor's: with one thread those of the run, and nearly the same whatever else
    the machine does.
    """
    task = (make or TASKS[name])(seed)
    opt = build(optimizer, task, point)
    equip(opt)
    steps = TASKS[name].steps if steps is None else steps
    rates = [group["lr"] for group in opt.param_groups]
    batches, seconds = task.batches(), 0.0
    curve = [[0, *task.reached(), 0.0]]
    for step in range(steps):
        anneal(opt, rates, step / steps)
        batch = next(batches)
        begun = time.process_time()
        loss = opt.step(closure_of(opt, batch, loss_scale))
        seconds += time.process_time() - begun
        if not torch.isfinite(loss.detach()) and optimizer not in OURS:
            curve.append([step + 1, math.nan, math.nan, seconds])
            break
        if (step + 1) * PARTS % steps < PARTS:
            curve.append([step + 1, *task.reached(), round(seconds, 3)])
    finite = all(map(math.isfinite, curve[-1]))
    return {
        "kind": "task",
        "task": name,
        "optimizer": optimizer,
        "point": point,
        "setting": point_text(point),
        "seed": seed,
        "steps": steps,
        "loss_scale": loss_scale,
        **environment("cpu"),
        "status": "complete" if finite else "diverged",
        "accuracy": task.accuracy() if finite else None,
        "curve": [[x if math.isfinite(x) else None for x in place] for place in curve],
        "counters": counters(opt),
    }


def closure_of(opt: Any, batch: Callable[[], Tensor], scale: float = 1.0) -> Callable[[], Tensor]:
    """What ``opt`` is stepped with."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = batch() * scale
        loss.backward()
        return loss

    return closure


def final(row: Row, key: str = "train") -> float:
    """What the run ended with; infinite where it diverged."""
    value = row["curve"][-1][1 if key == "train" else 2]
    return math.inf if row["status"] == "diverged" or value is None else value


def of(rows: Sequence[Row], task: str, optimizer: str) -> list[Row]:
    """The whole runs of an optimizer's grid on the task."""
    grid = [point_text(point) for point in GRIDS[optimizer]]
    return [
        row
        for row in rows
        if (row["task"], row["optimizer"]) == (task, optimizer)
        and row["steps"] == TASKS[task].steps
        and row["loss_scale"] == 1.0
        and row["setting"] in grid
    ]


def best(rows: Sequence[Row]) -> list[Row]:
    """The runs of the setting with the lowest training loss for seed 0, all seeds."""
    first = [row for row in rows if row["seed"] == 0]
    if not first:
        return []
    chosen = min(first, key=final)["setting"]
    return [row for row in rows if row["setting"] == chosen]


def spread(rows: Sequence[Row], key: str = "train") -> Spread:
    """Over the seeds."""
    return Spread.of([final(row, key) for row in rows])


def text(values: Spread) -> str:
    """Median (range), three digits."""
    middle, low, high = (f"{x:.3g}" for x in (values.median, values.smallest, values.largest))
    return middle if low == high else f"{middle} ({low}–{high})"
