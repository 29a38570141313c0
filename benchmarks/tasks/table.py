"""What the rows of the tasks say: a table for docs/choosing.md."""

from __future__ import annotations

import statistics

from benchmarks.summary import Row, Spread
from benchmarks.tables import lines_of, machine, markdown
from benchmarks.tasks.optimizers import GRIDS, LABELS
from benchmarks.tasks.runs import TASKS, best, final, of, spread, text


def tasks() -> str:
    """Per task all optimizers, the lowest median training loss first."""
    rows = lines_of("tasks")
    heads = ["task", "optimizer", "setting", "of", "seeds", "steps", "train", "test", "right"]
    body, places = [], {}
    for task, kind in TASKS.items():
        for name, runs in ranking(rows, task).items():
            seeds = len({row["seed"] for row in runs})
            body.append([kind.title, LABELS[name], runs[0]["setting"] or "the same everywhere"])
            body[-1] += [str(len(GRIDS[name])), str(seeds), str(kind.steps)]
            body[-1] += [text(spread(runs, key)) for key in ("train", "test")]
            body[-1].append(right(runs))
            places |= dict.fromkeys(machine(row) for row in runs)
    return markdown(heads, body) + "".join(f"\n{place}.\n" for place in places)


def ranking(rows: list[Row], task: str) -> dict[str, list[Row]]:
    """Each optimizer's best setting's runs, the lowest median training loss first."""
    found = {name: runs for name in GRIDS if (runs := best(of(rows, task, name)))}
    return dict(sorted(found.items(), key=lambda item: statistics.median(map(final, item[1]))))


def right(rows: list[Row]) -> str:
    """The share of the test set that is classified right, in per cent: median (range)."""
    shares = [100 * row["accuracy"] for row in rows if row.get("accuracy") is not None]
    return text(Spread.of(shares)) if shares else "–"
