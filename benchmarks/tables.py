"""Markdown tables, and what their cells look like."""

from __future__ import annotations

import math

from benchmarks.summary import Row
from kbfgs_ext.bench.environment import ROOT
from kbfgs_ext.bench.measure import load

RESULTS = ROOT / "benchmarks" / "results"


def lines_of(name: str) -> list[Row]:
    """The rows of ``benchmarks/results/NAME.jsonl``."""
    return load(RESULTS / f"{name}.jsonl")


def markdown(heads: list[str], body: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [heads, rule, *body])


def number(value: float | None, digits: int = 1) -> str:
    """``value`` with ``digits`` decimals, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def significant(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, without an exponent."""
    decimals = max(0, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{float(f'{value:.{digits}g}'):.{decimals}f}"


def machine(row: Row) -> str:
    """Where a row comes from."""
    commit = (row["commit"] or "no commit")[:10] + (" with changes" if row["dirty"] else "")
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}, commit {commit}"
