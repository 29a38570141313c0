"""Losses against seconds of training, for the demo and the comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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


def _panel(axis: Axes, runs: Sequence[dict[str, Any]], key: str) -> None:
    ends = []
    axis.set_yscale("log")
    for run in runs:
        look = LOOKS[run["config"]["optimizer"]]
        points = [(row["seconds"], row[key]) for row in run["rows"] if row[key] is not None]
        if not points:
            continue
        seconds, losses = zip(*points, strict=True)
        axis.plot(seconds, losses, look.line, color=look.colour, linewidth=2)
        label = look.label if run["status"] != "diverged" else f"{look.label} (diverged)"
        ends.append((seconds[-1], losses[-1], label, look.colour))
    axis.yaxis.set_major_locator(FixedLocator(TICKS))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("seconds of training")
    axis.set_xlim(left=0)
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.tick_params(labelleft=True)
    axis.spines[["top", "right"]].set_visible(False)
    _label_ends(axis, ends)


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
