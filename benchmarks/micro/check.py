"""The guard: which of our kernels have become slower against the eager reference of the same run.

A ratio that looks worse than the committed one is measured again, and only one that looks worse
every time is named: noise comes and goes, a slower kernel stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from benchmarks.micro.cases import Case, is_ours
from benchmarks.micro.measure import Row

LIMIT = 1.15
AGAIN = 4  # further measurements of a suspect

Key = tuple[str, str, str, str]
Measure = Callable[[Case], list[Row]]


@dataclasses.dataclass(frozen=True)
class Slowed:
    """A kernel that is slower than its row, or wrong."""

    kernel: str
    shape: str
    provider: str
    cache: str | None
    committed: float  # time over the eager reference's
    found: float | None  # the best of all measurements; None: wrong
    note: str = ""

    def __str__(self) -> str:
        name = f"{self.kernel}, {self.shape}, {self.provider}"
        name += f", {self.cache} cache" if self.cache not in ("any", None) else ""
        if self.found is None:
            return f"{name}: {self.note}"
        return (
            f"{name}: {self.found / self.committed:.2f} times as long as committed"
            f" ({self.committed:.3f} of eager then, {self.found:.3f} now)"
        )


def ratios(rows: Iterable[Row]) -> dict[Key, float]:
    """Ratio to eager of every row of ours that has one."""
    return {
        (row["kernel"], row["shape"], row["provider"], row["cache"]): row["ratio_to_eager"]
        for row in rows
        if is_ours(row["provider"]) and row["ratio_to_eager"] is not None
    }


def slowed(case: Case, committed: dict[Key, float], measure: Measure) -> list[Slowed]:
    """What of ``case`` takes more than `LIMIT` times its committed ratio each time."""
    mine = {key: ratio for key, ratio in committed.items() if key[:2] == case.key}
    if not mine:
        return []
    rows = measure(case)
    named = [
        Slowed(*case.key, row["provider"], None, 0.0, None, row["note"])
        for row in rows
        if is_ours(row["provider"]) and row.get("note", "").startswith("wrong")
    ]
    best = ratios(rows)
    for _ in range(AGAIN):
        if not any(_worse(best, key, ratio) for key, ratio in mine.items()):
            break
        for key, ratio in ratios(measure(case)).items():
            best[key] = min(ratio, best.get(key, ratio))
    return named + [
        Slowed(*key, ratio, best[key]) for key, ratio in mine.items() if _worse(best, key, ratio)
    ]


def _worse(found: dict[Key, float], key: Key, committed: float) -> bool:
    return key in found and found[key] > LIMIT * committed
