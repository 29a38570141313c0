"""What the kernels of a step take on a GPU: ``python -m benchmarks.step --kernels``.

The profiler times every kernel, copy and fill of a period of steps; the means of a step are by
name, longest first. What is left of the step is gaps between kernels, or the host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.step.measure import Runner
from benchmarks.step.models import Model
from benchmarks.step.providers import Provider
from kbfgs_ext.bench.clock import recorded
from kbfgs_ext.bench.measure import Row

NAME = re.compile(r"(void )?((\w|::|<unnamed>|\(anonymous namespace\))+)")
SHOWN = 25  # names in a table


def short(name: str) -> str:
    """A kernel's name without its return type, namespaces and arguments."""
    found = NAME.match(name)
    return (found[2] if found else name).rpartition("::")[2] or name


def kernels(provider: Provider, model: Model, x: Tensor, precision: str) -> Row:
    """The kernels of a step of ``provider``: how many of each name, and microseconds in all."""
    runner = Runner(provider, model, x, lambda who: None, precision)

    def steps() -> None:
        for _ in range(provider.period):
            runner.step()

    steps()
    events = [
        (short(event.name()), event.duration_ns() / 1e3)
        for event in recorded(steps, x.device)
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return {"provider": provider.name, "kernels": by_name(events, provider.period)}


def by_name(events: Iterable[tuple[str, float]], steps: int) -> list[dict[str, Any]]:
    """Sums over events (name, microseconds), as means of a step; the longest first."""
    found: dict[str, list[float]] = {}
    for name, microseconds in events:
        found.setdefault(name, []).append(microseconds)
    rows = [
        {"kernel": name, "launches": len(times) / steps, "us": sum(times) / steps}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def table(row: Row, title: str) -> Table:
    """A provider's kernels for people."""
    found: Sequence[dict[str, Any]] = row["kernels"]
    launches, busy = (sum(kernel[key] for kernel in found) for key in ("launches", "us"))
    made = Table(title=f"{title}, {row['provider']}: {launches:.0f} kernels, {busy:.0f} us a step")
    for head in ("kernel", "launches", "us"):
        made.add_column(head, justify="left" if head == "kernel" else "right")
    for kernel in found[:SHOWN]:
        made.add_row(kernel["kernel"], f"{kernel['launches']:.1f}", f"{kernel['us']:.1f}")
    return made
