"""A case, measured: one row per provider and state of the cache."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kbfgs_ext.bench.cases import (
    COMPILED,
    COMPILED_SHAPES,
    EAGER,
    Case,
    compiled,
    providers,
    why_not_compiled,
)
from kbfgs_ext.bench.clock import Ceiling, Meter, interleaved, meters, peak_bytes
from kbfgs_ext.bench.cost import Cost, cost
from kbfgs_ext.bench.environment import environment, state
from kbfgs_ext.bench.gate import Gate, copies
from kbfgs_ext.bench.kernel import Numbers
from kbfgs_ext.bench.precision import PRECISIONS
from kbfgs_ext.ops import registry

Row = dict[str, Any]
QUANTILES = (0.2, 0.5, 0.8)
CASE = ("kernel", "shape", "precision")  # what the rows of a case have in common


class Bench:
    """Measures cases on a device against its ceiling."""

    def __init__(
        self, device: torch.device, ceiling: Ceiling, seconds: float = 1.0, full: bool = False
    ) -> None:
        self.device, self.ceiling = device, ceiling
        self.seconds = seconds  # of timing a case, all providers together
        self.full = full
        self.environment = environment(device)

    def rows(self, case: Case, wanted: Callable[[str], bool] = lambda name: True) -> list[Row]:
        """The rows of a case: of the eager reference and of the other providers ``wanted``."""
        with PRECISIONS[case.precision].set():
            return self._rows(case, wanted)

    def _rows(self, case: Case, wanted: Callable[[str], bool]) -> list[Row]:
        args = case.build(self.device)
        gate = Gate(case.kernel.op, args)
        runs = {n: r for n, r in providers(case, self.device).items() if n == EAGER or wanted(n)}
        notes: dict[str, str] = {}
        if wanted(COMPILED) and (self.full or case.shape in COMPILED_SHAPES):
            reason = why_not_compiled(case)
            if reason is None:
                runs[COMPILED] = compiled(case)
            else:
                notes[COMPILED] = f"skipped: {reason}"

        clocks: dict[tuple[str, str], Meter] = {}
        peaks: dict[str, int] = {}
        for name, run in runs.items():
            mine = copies(args)
            try:
                run(mine)
            except registry.Unsupported as reason:
                notes[name] = f"skipped: {reason}"
                continue
            except Exception as error:  # whatever torch.compile may raise
                if name != COMPILED:
                    raise
                notes[name] = f"skipped: {type(error).__name__}"
                continue
            wrong = gate.verdict(mine)
            if wrong is not None:
                notes[name] = f"wrong: {wrong}"
                continue
            call = functools.partial(run, mine)
            peaks[name] = peak_bytes(call, self.device)
            found = meters(call, self.device)
            clocks |= {(name, cache): meter for cache, meter in found.items()}
        del gate

        readings = interleaved(clocks, self.seconds)
        now = state(self.device)
        price = cost(case.kernel.op, args)
        rows = [
            self._row(case, name, cache)
            | now
            | {"peak_bytes": peaks[name]}
            | self._figures(times, readings[EAGER, cache], price)
            for (name, cache), times in readings.items()
        ]
        return rows + [
            self._row(case, name, None) | {"note": note, "us": None, "ratio_to_eager": None}
            for name, note in notes.items()
        ]

    def _row(self, case: Case, provider: str, cache: str | None) -> Row:
        return {
            "kind": "micro",
            "kernel": case.kernel.name,
            "op": case.kernel.op,
            "family": registry.ops()[case.kernel.op],
            "shape": case.shape,
            "layers": [[x.n_g, x.n_a] for x in case.layers],
            "batch_size": Numbers.batch,
            "precision": case.precision,
            "seed": Numbers.seed,
            "provider": provider,
            "cache": cache,
            **self.environment,
        }

    def _figures(self, times: list[float], eager: list[float], price: Cost) -> Row:
        median = quantile(times, 0.5)
        floors = {
            "memory": price.bytes / self.ceiling.bytes_per_second,
            "compute": price.flops / self.ceiling.flops_per_second,
        }
        bound = max(floors, key=lambda name: floors[name])
        return {
            "rounds": len(times),
            "us": {f"q{100 * q:.0f}": 1e6 * quantile(times, q) for q in QUANTILES},
            # Of the same round: what slows both down falls out.
            "ratio_to_eager": quantile([t / e for t, e in zip(times, eager, strict=True)], 0.5),
            "bytes": price.bytes,
            "flops": price.flops,
            "gb_per_s": price.bytes / median / 1e9,
            "tflop_per_s": price.flops / median / 1e12,
            "bound": bound,
            "share_of_ceiling": floors[bound] / median,
            "ceiling_gb_per_s": self.ceiling.bytes_per_second / 1e9,
            "ceiling_tflop_per_s": self.ceiling.flops_per_second / 1e12,
        }


def quantile(values: list[float], q: float) -> float:
    """The quantile, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64, device="cpu").quantile(q))


def load(path: Path) -> list[Row]:
    """The rows of a file, a line each."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same_machine(row: Row, other: Row) -> bool:
    """Whether two rows or environments come from the same kind of device."""
    return all(row.get(name) == other.get(name) for name in ("device", "device_type", "threads"))


def store(path: Path, rows: list[Row], case: Sequence[str] = CASE) -> None:
    """Write the rows in place of those of the same cases from the same kind of device.

    ``case`` names the keys that a case's rows have in common.
    """

    def replaced(old: Row) -> bool:
        return tuple(old[key] for key in case) in cases and same_machine(old, rows[0])

    cases = {tuple(row[key] for key in case) for row in rows}
    kept = [row for row in load(path) if not replaced(row)] if rows else load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept + rows))
