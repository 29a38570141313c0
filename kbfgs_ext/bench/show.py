"""Rows for people: a line, the table of headlines, a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kbfgs_ext.bench.cases import APART, is_ours

Row = dict[str, Any]
STEADY = ("any", "warm")  # states of the cache that a headline is about


def line(row: Row) -> str:
    """A row for people."""
    cache = {"cold": ", cold", "warm": ", warm"}.get(row["cache"], "")
    name = f"{row['kernel']:28} {row['shape']:16} {row['provider'] + cache:24}"
    if row["us"] is None:
        return f"{name} {row['note']}"
    us = row["us"]
    rate = (
        f"{row['gb_per_s']:7.1f} GB/s   "
        if row["bound"] == "memory"
        else f"{row['tflop_per_s']:7.3f} TFLOP/s"
    )
    return (
        f"{name} {us['q50']:10.1f} us ({us['q20']:.1f}-{us['q80']:.1f})"
        f"  {row['ratio_to_eager']:6.3f} of eager  {rate} {row['share_of_ceiling']:6.1%}"
        f"{from_cache(row)}  +{row['peak_bytes'] / 2**20:.1f} MiB"
    )


def from_cache(row: Row) -> str:
    """Why a rate is above that of the memory, or nothing."""
    room = row.get("cache_bytes")
    if row["bound"] != "memory" or row["share_of_ceiling"] <= 1 or row["cache"] == "cold":
        return ""
    if room is None or row["bytes"] > room:
        return " (partly from a cache)"
    return f" (from a cache: {row['bytes'] / 2**20:.1f} of {room / 2**20:.0f} MiB)"


def headlines(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Of every kernel and shape our fastest row and the fastest of the alternatives."""
    found: dict[tuple, tuple[list[Row], list[Row]]] = {}
    for row in rows:
        if row["us"] is None or row["cache"] not in STEADY or row["provider"].endswith(APART):
            continue
        sides = found.setdefault((row["kernel"], row["shape"]), ([], []))
        sides[not is_ours(row["provider"])].append(row)
    return [(min(ours, key=_us), min(others, key=_us)) for ours, others in found.values() if ours]


def _us(row: Row) -> float:
    return row["us"]["q50"]


def table(rows: Iterable[Row]) -> Table:
    """Ours beside the best alternative, whichever that is."""
    made = Table(title="ours beside the fastest alternative", title_justify="left")
    for head in ("kernel", "shape", "ours"):
        made.add_column(head)
    made.add_column("us", justify="right")
    made.add_column("alternative")
    made.add_column("us", justify="right")
    made.add_column("times as fast", justify="right")
    for ours, other in headlines(rows):
        cells = [ours["kernel"], ours["shape"], ours["provider"], f"{_us(ours):.1f}"]
        made.add_row(
            *cells, other["provider"], f"{_us(other):.1f}", f"{_us(other) / _us(ours):.2f}"
        )
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    """How many times as fast ours are as the fastest alternative, a bar a kernel and shape."""
    from matplotlib.figure import Figure

    shown = headlines(rows)
    names = [f"{ours['kernel']}, {ours['shape']}" for ours, _ in shown]
    times = [_us(other) / _us(ours) for ours, other in shown]
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(shown)), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.barh(names, times, color=["#0072B2" if t >= 1 else "#D55E00" for t in times])
    for i, (value, (_, other)) in enumerate(zip(times, shown, strict=True)):
        axis.text(value, i, f" {value:.2f}, {other['provider']}", va="center", fontsize=7)
    axis.axvline(1.0, color="#555555", linewidth=0.8)
    axis.set_xscale("log")
    axis.margins(x=0.25, y=0.01)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("times as fast as the fastest alternative, named at the bar")
    first = rows[0]
    figure.suptitle(
        f"kbfgs_ext's kernels, {first['precision']}: {first['device']}, {first['threads']} threads,"
        f" torch {first['torch']}",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
