"""Every optimizer against every other: ``python -m benchmarks.compare``.

Trains the paper's three autoencoders for equal seconds. Each optimizer is tuned over its own grid
(grids.py) with one seed, then runs its best point, lowest training loss when the seconds are spent,
with several other seeds. Every run appends a line to ``compare.jsonl`` and runs that are there
already are not made again, so that a killed comparison goes on where it was. Seconds are those of
training: warm start included, evaluation excluded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import data, optimizers, plots, report, summary
from benchmarks.data import DataError, Dataset, faces
from benchmarks.grids import GRIDS, SIZE
from benchmarks.optimizers import Settings
from benchmarks.records import Run
from benchmarks.summary import Row
from benchmarks.training import Config, train
from kbfgs_ext.bench.environment import ROOT, environment

TUNING_SEED = 0
EPOCHS = 1_000_000  # more than the seconds allow anywhere
QUICK_OUT = ROOT / "build" / "out" / "compare"
QUICK_PATCHES = 20  # per face image: 5,000 for training
# A row's curves and where a run has them.
CURVES = {"epochs": "epoch"} | {key: key for key in ("seconds", "train_loss", "test_loss")}
DIGITS = 6  # significant ones that are kept of losses and seconds


@dataclass(frozen=True)
class Plan:
    """What is compared, and at what cost."""

    datasets: tuple[str, ...] = data.NAMES
    optimizers: tuple[str, ...] = tuple(GRIDS)
    points: int = SIZE  # of each grid
    seeds: tuple[int, ...] = (1, 2, 3)
    budget: float = 120.0  # seconds of training a run
    tune_budget: float = 120.0  # the same for a tuning run
    evaluate_every: int = 20  # steps, and after every epoch
    batch_size: int = 1_000
    weight_decay: float = 1e-5
    device: str = "cpu"
    threads: int | None = None  # of the CPU; None: as torch has it

    @property
    def runs(self) -> int:
        """How many there are at most."""
        tuning = self.points if self.points > 1 else 0
        return len(self.datasets) * len(self.optimizers) * (tuning + len(self.seeds))


def identity(row: Row) -> str:
    """What decides about a run; two rows that agree in it are the same run."""
    names = ("stage", "dataset", "data", "train", "optimizer", "point", "seed", "budget")
    names += ("batch_size", "weight_decay", "device", "threads")
    return json.dumps([row[name] for name in names], sort_keys=True)


class Book:
    """The rows made so far, and the file they are kept in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = summary.read_rows(path)
        self._known = {identity(row): row for row in self.rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # what a killed process left of its last line goes
            whole = path.read_bytes()
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])

    def get(self, head: Row) -> Row | None:
        """The row of the same run, if it was made."""
        return self._known.get(identity(head))

    def add(self, row: Row) -> None:
        """Append a line to the file."""
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self.rows.append(row)
        self._known[identity(row)] = row


@dataclass
class Bench:
    """One data set with what it takes to run on it."""

    plan: Plan
    book: Book
    dataset: Dataset
    console: Console

    def row(self, stage: str, optimizer: str, point: Settings, seed: int) -> Row:
        """The run's row, from the book or made now."""
        plan = self.plan
        budget = plan.tune_budget if stage == "tune" else plan.budget
        config = Config(
            dataset=self.dataset.name,
            optimizer=optimizer,
            settings=point,
            epochs=EPOCHS,
            max_seconds=budget,
            evaluate_every=plan.evaluate_every,
            batch_size=plan.batch_size,
            weight_decay=plan.weight_decay,
            seed=seed,
            device=plan.device,
        )
        head = {
            "kind": "compare",
            "stage": stage,
            "dataset": self.dataset.name,
            "data": self.dataset.label,
            "train": len(self.dataset.train),
            "optimizer": optimizer,
            "point": point.given(),
            "seed": seed,
            "budget": budget,
            "batch_size": plan.batch_size,
            "weight_decay": plan.weight_decay,
            "dtype": "float32",
            **environment(plan.device),
        }
        found = self.book.get(head)
        if found is None:
            found = head | outcome(train(config, self.dataset))
            self.book.add(found)
            self._say(found)
        return found

    def tuned(self, optimizer: str) -> Settings:
        """The point of the optimizer's grid that ends lowest; the only one without tuning."""
        points = GRIDS[optimizer][: self.plan.points]
        if len(points) == 1:
            return points[0]
        rows = [self.row("tune", optimizer, point, TUNING_SEED) for point in points]
        return points[min(range(len(rows)), key=lambda i: summary.loss_at_budget(rows[i]))]

    def run(self, names: Sequence[str]) -> None:
        """Tune all, then a round over all for each seed.

        In rounds, since a machine that slows down for a while then does so for all of them.
        """
        chosen = {name: self.tuned(name) for name in names}
        for seed in self.plan.seeds:
            for name, point in chosen.items():
                self.row("final", name, point, seed)

    def _say(self, row: Row) -> None:
        self.console.print(
            f"{row['stage']:<5} {row['dataset']:<6} {row['optimizer']:<7} seed {row['seed']}"
            f" {summary.point_text(row['point'])}: {row['train_loss'][-1] or math.nan:.4g}"
            f" after {row['epochs'][-1]:.4g} epochs, {row['seconds'][-1]:.1f} s ({row['status']})",
            highlight=False,
            soft_wrap=True,
        )


def outcome(run: Run) -> Row:
    """The part of a row that is known after the run."""
    payload = run.payload()
    rows = payload["rows"]
    return {
        "status": run.status,
        "settings": payload["config"]["settings"],
        **{
            name: [None if row[key] is None else float(f"{row[key]:.{DIGITS}g}") for row in rows]
            for name, key in CURVES.items()
        },
        "counters": rows[-1]["counters"],
    }


def compare(plan: Plan, book: Book, load: Callable[[str], Dataset], console: Console) -> None:
    """Make every run of ``plan`` that ``book`` lacks; ``load`` gets a data set by its name."""
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    reasons = {name: optimizers.missing(name) for name in plan.optimizers}
    for name, reason in reasons.items():
        if reason is not None:
            console.print(f"{name} is left out: {reason}", style="yellow", highlight=False)
    for name in plan.datasets:
        try:
            dataset = load(name)
        except DataError as error:
            console.print(f"{name} is left out: {error}", style="yellow", highlight=False)
            continue
        console.print(dataset.summary, highlight=False, soft_wrap=True)
        Bench(plan, book, dataset, console).run([n for n in plan.optimizers if not reasons[n]])


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A figure per data set and machine."""
    written = []
    for group in summary.groups(rows):
        written.append(folder / f"{group.name}.png")
        plots.comparison(group, written[-1])
    return written


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default = Plan()
    made = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    made.add_argument("--datasets", nargs="+", choices=data.NAMES, default=default.datasets)
    made.add_argument("--optimizers", nargs="+", choices=GRIDS, default=default.optimizers)
    made.add_argument("--points", type=int, help=f"the first of each grid, default all {SIZE}")
    made.add_argument("--seeds", type=int, nargs="+", help="default 1 2 3")
    made.add_argument("--budget", type=float, metavar="SECONDS", help="a run, default 120")
    made.add_argument("--tune-budget", type=float, metavar="SECONDS", help="default as --budget")
    made.add_argument("--evaluate-every", type=int, metavar="STEPS", help="default 20")
    made.add_argument("--batch-size", type=int, default=default.batch_size)
    made.add_argument("--weight-decay", type=float, default=default.weight_decay)
    made.add_argument("--device", default=None, help="default the GPU if there is one")
    made.add_argument("--threads", type=int, help="CPU threads, default torch's choice")
    made.add_argument("--data", metavar="DIR", help="folder with data files")
    made.add_argument("--patches-per-image", type=int, help="size of the FACES-like set")
    made.add_argument("--out", type=Path, help="folder for compare.jsonl and compare/*.png")
    made.add_argument(
        "--quick",
        action="store_true",
        help="a few minutes to see it work: one point, one seed, 3 seconds, few faces, build/out",
    )
    return made


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What the command line asks for; ``--quick`` changes what is not given."""
    preset = Plan(points=1, seeds=(1,), budget=3.0, evaluate_every=5) if arguments.quick else Plan()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget = arguments.budget or preset.budget
    return Plan(
        datasets=tuple(arguments.datasets),
        optimizers=tuple(arguments.optimizers),
        points=arguments.points or preset.points,
        seeds=tuple(arguments.seeds or preset.seeds),
        budget=budget,
        tune_budget=arguments.tune_budget or budget,
        evaluate_every=arguments.evaluate_every or preset.evaluate_every,
        batch_size=arguments.batch_size,
        weight_decay=arguments.weight_decay,
        device=arguments.device or device,
        threads=arguments.threads,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = parser().parse_args(argv)
    console = Console()
    plan = plan_of(arguments)
    out = arguments.out or (QUICK_OUT if arguments.quick else report.RESULTS)
    patches = QUICK_PATCHES if arguments.quick else faces.PATCHES_PER_IMAGE
    book = Book(out / "compare.jsonl")

    def load(name: str) -> Dataset:
        return data.load(
            name, arguments.data, patches_per_image=arguments.patches_per_image or patches
        )

    console.print(
        f"at most {plan.runs} runs of {plan.budget:g} s of training ({len(book.rows)} rows in"
        f" {book.path})",
        highlight=False,
    )
    try:
        compare(plan, book, load, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        return 130
    if not summary.groups(book.rows):
        print("error: nothing was compared", file=sys.stderr)
        return 1
    print(report.comparison(book.rows))
    for path in (book.path, *write_plots(book.rows, out / "compare")):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
