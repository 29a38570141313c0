"""What rows of ``benchmarks.compare`` say: times to fixed losses, chosen settings, medians.

Between two evaluations the logarithm of the loss is taken as linear, in seconds and in epochs, so
that optimizers with long epochs are not rounded up further than others.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grids import GRIDS

Row = dict[str, Any]

AXES = ("seconds", "epochs")


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file, oldest first; a last line that was cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def crossing(row: Row, loss: float, axis: str) -> float:
    """Seconds or epochs until the training loss is ``loss``; infinite where it never is.

    A run that diverged has reached nothing: nobody would take its network.
    """
    if row["status"] == "diverged":
        return math.inf
    losses, places = row["train_loss"], row[axis]
    if losses[0] <= loss:
        return places[0]
    for (l0, x0), (l1, x1) in pairwise(zip(losses, places, strict=True)):
        if l1 <= loss < l0:
            return x0 + (x1 - x0) * math.log(l0 / loss) / math.log(l0 / l1)
    return math.inf


def values_at(row: Row, places: Sequence[float], axis: str, key: str = "train_loss") -> np.ndarray:
    """The loss at each of ``places`` on the axis; infinite where it is not finite."""
    losses = [math.inf if loss is None else loss for loss in row[key]]
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    found = np.exp(np.interp(places, row[axis][:finite], np.log(losses[:finite])))
    return found if finite == len(losses) else np.full_like(found, math.inf)


def loss_at_budget(row: Row, key: str = "train_loss") -> float:
    """The loss when the run's seconds were spent; infinite for a run that diverged.

    The last epoch ends after that, later for optimizers with long epochs.
    """
    return float(values_at(row, [row["budget"]], "seconds", key)[0])


@dataclass(frozen=True)
class Spread:
    """Median and range over seeds; infinite where a seed has no value."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self) -> str:
        """``median (smallest-largest)`` with three digits; a dash where the median is infinite."""
        middle, low, high = map(_short, (self.median, self.smallest, self.largest))
        if middle == "∞":
            middle = "–"
        return middle if low == high else f"{middle} ({low}–{high})"


def _join(counts: Sequence[float]) -> str:
    return " or ".join(f"{count:g}" for count in counts)


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass(frozen=True)
class Group:
    """All rows of one data set on one kind of machine."""

    rows: list[Row]

    @property
    def finals(self) -> dict[str, list[Row]]:
        """Per optimizer the runs over several seeds with its chosen settings."""
        chosen = {name: best_point(self.rows, name) for name in GRIDS}
        rows = [r for r in self.rows if r["stage"] == "final"]
        rows = [row for row in rows if row["point"] == chosen.get(row["optimizer"])]
        found: dict[str, list[Row]] = {}
        for row in rows:
            if row["budget"] == rows[-1]["budget"]:
                found.setdefault(row["optimizer"], []).append(row)
        return found

    @property
    def last(self) -> Row:
        """The newest of the rows that are reported."""
        reported = self.finals
        return next(row for row in reversed(self.rows) if row in reported.get(row["optimizer"], []))

    @property
    def conditions(self) -> str:
        """Data, seeds, tuning and budget in a line."""
        finals = self.finals
        seeds = sorted({len(rows) for rows in finals.values()})
        points = sorted({len(tuning(self.rows, name)) for name in finals})
        spent = sorted({row["budget"] for name in finals for row in tuning(self.rows, name)})
        tuned = f"tuned with seed 0 over {_join(points)} points each, {_join(spent)} s a point"
        tuned = tuned if points[-1] else "untuned"
        return (
            f"{self.last['data']}, batch {self.last['batch_size']}, {self.last['budget']:g} s of"
            f" training a run; median (smallest–largest) of {_join(seeds)} seeds, {tuned}"
        )

    @property
    def ranked(self) -> dict[str, list[Row]]:
        """``finals``, lowest median training loss at the end of the budget first."""
        losses = {
            name: statistics.median(map(loss_at_budget, rows)) for name, rows in self.finals.items()
        }
        return {name: self.finals[name] for name in sorted(losses, key=losses.__getitem__)}

    @property
    def name(self) -> str:
        """For file names: data set and kind of device."""
        last = self.rows[-1]
        words = re.findall(r"[a-z0-9]+", last["data"].lower().replace(",", ""))
        return "-".join([*words, last["device_type"]])


def groups(rows: Sequence[Row]) -> list[Group]:
    """The rows by data set and machine, where there is something to report, in their order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("dataset", "data", "train", "device", "threads", "batch_size"))
        found.setdefault(key, []).append(row)
    return [group for group in map(Group, found.values()) if group.finals]


def tuning(rows: Sequence[Row], optimizer: str) -> list[Row]:
    """The newest tuning run of every point that the optimizer's grid has today."""
    grid = [point.given() for point in GRIDS[optimizer]]
    tuned = [r for r in rows if r["stage"] == "tune" and r["optimizer"] == optimizer]
    tuned = [row for row in tuned if row["point"] in grid]
    return [row for row in tuned if row["budget"] == tuned[-1]["budget"]]


def best_point(rows: Sequence[Row], optimizer: str) -> Row:
    """The settings whose tuning run ended lowest; the grid's first where none was made."""
    tuned = tuning(rows, optimizer)
    return min(tuned, key=loss_at_budget)["point"] if tuned else GRIDS[optimizer][0].given()


def point_text(point: Row) -> str:
    """A grid point for people."""
    return ", ".join(f"{name} {value}" for name, value in point.items())
