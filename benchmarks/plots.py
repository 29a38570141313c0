"""Losses against seconds and epochs of training, for the demo and the comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks import summary

matplotlib.use("Agg")  # files only, no display needed


@dataclass(frozen=True)
class Look:
    """How an optimizer is drawn in every plot of the project."""

    label: str
    colour: str  # Okabe and Ito's palette, made for colour-blind readers
    line: str  # ours solid, all others dashed


LOOKS = {
    "kbfgs": Look("K-BFGS", "#0072B2", "-"),
    "kbfgsl": Look("K-BFGS(L)", "#D55E00", "-"),
    "adamw": Look("AdamW", "#009E73", "--"),
    "sgdm": Look("SGD, momentum", "#CC79A7", "--"),
    "rmsprop": Look("RMSprop", "#E69F00", "--"),
    "muon": Look("Muon", "#56B4E9", "--"),
    "soap": Look("SOAP", "#8C564B", "--"),
    "kfac": Look("K-FAC", "#000000", "--"),
}

POINTS = 300  # of a median curve
EPOCHS_SHOWN = 2.0  # times the median of what the optimizers reach: the cheap ones run far longer

PANELS = {"train_loss": "training loss", "test_loss": "test loss"}
LABEL_GAP = 0.055  # of the axis height: one line of text
LABEL_WIDTH = 0.25  # of the axis width: the longest name
TICKS = tuple(m * 10**k for k in range(-2, 5) for m in (1, 1.5, 2, 3, 4, 5, 6, 7, 8))


def loss_against_seconds(
    runs: Sequence[dict[str, Any]], path: str | Path, title: str, note: str = ""
) -> None:
    """Draw training and test loss of ``runs`` (``Run.payload()``) over seconds of training.

    One line per run, named at its end; the loss axis is logarithmic. ``path`` ends in png or svg.
    """
    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (key, name) in zip(axes, PANELS.items(), strict=True):
        _panel(axis, runs, key)
        axis.set_title(name, loc="left", fontsize=11)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def comparison(group: summary.Group, path: str | Path) -> None:
    """Draw training loss over seconds and over epochs: medians of the seeds, ranges shaded."""
    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(summary.AXES), sharey=True)
    ranked = group.ranked
    for axis, unit in zip(axes, summary.AXES, strict=True):
        for name, runs in ranked.items():
            _median(axis, runs, unit, LOOKS[name])
        _dress(axis, "seconds of training" if unit == "seconds" else unit)
    axes[0].set_xlim(0, group.last["budget"])
    ends = [min(run["epochs"][-1] for run in runs) for runs in ranked.values()]
    axes[1].set_xlim(0, min(max(ends), EPOCHS_SHOWN * statistics.median(ends)))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=10)
    figure.suptitle(
        f"Training loss, {group.last['data']}", x=0.01, ha="left", fontsize=13, fontweight="bold"
    )
    note = f"{group.conditions}; {group.last['device']}, {group.last['threads']} threads"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _median(axis: Axes, runs: Sequence[dict[str, Any]], unit: str, look: Look) -> None:
    """The median of the seeds' losses, as far as all of them ran, and their range."""
    places = np.linspace(0, min(run[unit][-1] for run in runs), POINTS)
    losses = np.stack([summary.values_at(run, places, unit) for run in runs])
    middle = np.median(losses, axis=0)
    if not np.isfinite(middle).all():
        axis.plot([], [], look.line, color=look.colour, label=f"{look.label} (diverged)")
        return
    axis.plot(places, middle, look.line, color=look.colour, linewidth=1.4, label=look.label)
    finite = np.isfinite(losses).all(axis=1)
    low, high = losses[finite].min(axis=0), losses[finite].max(axis=0)
    axis.fill_between(places, low, high, color=look.colour, alpha=0.15, linewidth=0)


def _panel(axis: Axes, runs: Sequence[dict[str, Any]], key: str) -> None:
    ends = []
    for run in runs:
        look = LOOKS[run["config"]["optimizer"]]
        points = [(row["seconds"], row[key]) for row in run["rows"] if row[key] is not None]
        if not points:
            continue
        seconds, losses = zip(*points, strict=True)
        axis.plot(seconds, losses, look.line, color=look.colour, linewidth=2)
        label = look.label if run["status"] != "diverged" else f"{look.label} (diverged)"
        ends.append((seconds[-1], losses[-1], label, look.colour))
    _dress(axis, "seconds of training")
    axis.set_xlim(left=0)
    _label_ends(axis, ends)


def _dress(axis: Axes, name: str) -> None:
    """Logarithmic losses with round ticks, a light grid, the name of the other axis."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(FixedLocator(TICKS))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel(name)
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.tick_params(labelleft=True)
    axis.spines[["top", "right"]].set_visible(False)


def _label_ends(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Name the lines to the right of their ends, moved upwards where the names would collide."""
    to_fraction = axis.transData + axis.transAxes.inverted()
    placed: list[tuple[float, float]] = []
    for seconds, loss, label, colour in sorted(ends, key=lambda end: end[1]):
        x, y = to_fraction.transform((seconds, loss))
        below = (height for at, height in placed if abs(at - x) < LABEL_WIDTH)
        y = max(y, max(below, default=-1.0) + LABEL_GAP)
        placed.append((x, y))
        axis.text(x + 0.015, y, label, color=colour, transform=axis.transAxes, va="center", size=10)
