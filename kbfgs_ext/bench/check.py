"""The guard: which of our kernels have become slower than their committed rows.

A kernel has slowed where its time has grown both in itself and against the eager reference of the
same run: the machine slows both down, and luck of the eager reference (it allocates) leaves the
kernel's own time. Fast readings are compared (the 20% quantile), since noise only ever adds. What
looks slower is measured again, and only what looks slower every time is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kbfgs_ext.bench.cases import EAGER, Case, is_ours
from kbfgs_ext.bench.measure import Row

LIMIT = 1.15
AGAIN = 4  # further measurements of a suspect

Key = tuple[str, str, str, str]  # kernel, shape, provider, state of the cache
Measure = Callable[[Case], list[Row]]


class Speed(NamedTuple):
    """Of one of our kernels."""

    us: float
    of_eager: float

    def growth(self, then: Speed) -> float:
        """Times as long as ``then``, by whichever clock is kinder."""
        return min(self.us / then.us, self.of_eager / then.of_eager)


@dataclasses.dataclass(frozen=True)
class Slowed:
    """A kernel that is slower than its row, or wrong."""

    kernel: str
    shape: str
    provider: str
    cache: str | None
    note: str

    def __str__(self) -> str:
        cache = f", {self.cache} cache" if self.cache in ("cold", "warm") else ""
        return f"{self.kernel}, {self.shape}, {self.provider}{cache}: {self.note}"


def speeds(rows: Iterable[Row]) -> dict[Key, Speed]:
    """The speed of every row of ours that has a time."""
    us: dict[Key, float] = {
        (row["kernel"], row["shape"], row["provider"], row["cache"]): row["us"]["q20"]
        for row in rows
        if row["us"] is not None
    }
    return {
        (kernel, shape, provider, cache): Speed(time, time / us[kernel, shape, EAGER, cache])
        for (kernel, shape, provider, cache), time in us.items()
        if is_ours(provider)
    }


def slowed(case: Case, committed: dict[Key, Speed], measure: Measure) -> list[Slowed]:
    """What of ``case`` has become wrong, or takes more than `LIMIT` times as long each time."""
    then = {key: speed for key, speed in committed.items() if key[:2] == case.key}
    if not then:
        return []
    rows = measure(case)
    named = [
        Slowed(*case.key, row["provider"], None, row["note"])
        for row in rows
        if is_ours(row["provider"]) and row.get("note", "").startswith("wrong")
    ]
    now = speeds(rows)
    growth = {key: now[key].growth(then[key]) for key in now.keys() & then.keys()}
    for _ in range(AGAIN):
        if all(times <= LIMIT for times in growth.values()):
            break
        now = speeds(measure(case))
        for key in growth.keys() & now.keys():
            growth[key] = min(growth[key], now[key].growth(then[key]))
    return named + [
        Slowed(*key, f"{growth[key]:.2f} times as long as committed ({speed.us:.1f} us then)")
        for key, speed in then.items()
        if growth.get(key, 0) > LIMIT
    ]
