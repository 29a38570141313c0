"""Two files of rows, of two commits or two machines, compared: faster, slower, the same, undecided.

A kernel's times spread, so what is compared are ranges: from the 20 % to the 80 % quantile. New
over old then lies between new 20 % over old 80 % and new 80 % over old 20 %. A verdict needs that
range to lie on one side of 1, or within `SAME` of it; on the same machine the ratio to the eager
reference, which ran between, must have moved to the same side, or the machine was what changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from kbfgs_ext.bench.cases import is_ours
from kbfgs_ext.bench.measure import same_machine

Row = dict[str, Any]
SAME = 1.1  # up to it, and down to its inverse, a growth is none
FASTER, SLOWER, ALIKE, UNDECIDED = "faster", "slower", "the same", "undecided"


class Verdict(NamedTuple):
    """Of one of our kernels; ``growth`` is new over old."""

    kernel: str
    shape: str
    provider: str
    cache: str
    old_us: float
    new_us: float
    low: float
    high: float
    word: str

    @property
    def growth(self) -> float:
        """Of the median."""
        return self.new_us / self.old_us


def key(row: Row) -> tuple:
    """What makes two rows comparable."""
    return tuple(row[name] for name in ("kernel", "shape", "precision", "provider", "cache"))


def verdicts(old: Iterable[Row], new: Iterable[Row]) -> Iterator[Verdict]:
    """Of every kernel of ours that has a time in both."""
    before = {key(row): row for row in old if row["us"] is not None}
    for row in new:
        then = before.get(key(row))
        if row["us"] is not None and then is not None and is_ours(row["provider"]):
            yield judged(then, row)


def judged(old: Row, new: Row) -> Verdict:
    """The verdict on one kernel."""
    low = new["us"]["q20"] / old["us"]["q80"]
    high = new["us"]["q80"] / old["us"]["q20"]
    beside = new["ratio_to_eager"] / old["ratio_to_eager"]
    agrees = same_machine(old, new)
    if high < 1 and (beside < 1 or not agrees):
        word = FASTER
    elif low > 1 and (beside > 1 or not agrees):
        word = SLOWER
    elif low >= 1 / SAME and high <= SAME:
        word = ALIKE
    else:
        word = UNDECIDED
    medians = old["us"]["q50"], new["us"]["q50"]
    return Verdict(
        new["kernel"], new["shape"], new["provider"], new["cache"], *medians, low, high, word
    )
