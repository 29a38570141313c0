"""Physics-informed networks, equal seconds or equal passes: ``python -m benchmarks.physics``.

K-BFGS, L-BFGS and Adam on the equations of equations.py, in float64 and full batches, judged by the
error of the solution when the seconds of training are spent; or, with ``--passes``, when the
closure has run so often, which no other work on the machine can change. Each optimizer runs the
first of its settings; with ``--grid`` all of them, an equal number each, and the one of the lowest
median error over the seeds counts. A run is a row; it replaces that of the same run on the same
machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks import plots, summary
from benchmarks.equations import PROBLEMS
from benchmarks.optimizers import anneal, options_of
from benchmarks.plots import Look
from benchmarks.progress import REFRESH
from benchmarks.summary import Row
from benchmarks.training import Stopwatch, counters
from kbfgs_ext import KBFGS
from kbfgs_ext.bench.environment import ROOT, environment
from kbfgs_ext.bench.measure import same_machine, store

OUT = ROOT / "benchmarks" / "results"
EVALUATIONS = 60  # of a run, evenly over its budget
UNITS = ("passes", "seconds")  # of a budget: runs of the closure, or time in steps
IDENTITY = ("problem", "points", "width", "optimizer", "setting", "seed", *UNITS)

# Of an optimizer, by flat words; "cosine": anneal the learning rate over the budget.
Options = dict[str, Any]

# The batch is the whole set: a pair of its own step, no average over others. Such losses are smooth
# and small, and so want little damping.
_NEWTON: Options = {
    "lr": 0.3,
    "direction": "newton",
    "nesterov": False,
    "relative_damping": False,
    "damping_a": 1e-3,
    "damping_g": 1e-3,
    "pair_decay": 0.0,
    "pair_every": 1,
    "initial_scale": "damping",
    "step_length": "balanced",
}
_DEFAULTS: Options = {"lr": 0.05, "pair_decay": 0.0, "cosine": True}  # the constructor's

# As many settings for each; the first is the one that runs without --grid.
GRIDS: dict[str, tuple[Options, ...]] = {
    "kbfgs": (_NEWTON, _NEWTON | {"lr": 1.0}, _NEWTON | {"nesterov": True}, _DEFAULTS),
    "lbfgs": tuple({"lr": 1.0, "history_size": n} for n in (100, 50, 20, 10)),
    "adam": tuple({"lr": lr, "cosine": True} for lr in (3e-3, 1e-3, 1e-2, 3e-2)),
}

LOOKS = {
    "kbfgs": plots.LOOKS["kbfgs"],
    "lbfgs": Look("L-BFGS", "#D55E00", "--"),
    "adam": Look("Adam", "#009E73", "--"),
}


def build(name: str, model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The optimizer ``name`` over all parameters of ``model``."""
    if name == "kbfgs":
        return KBFGS(model, **options_of(options))
    if name == "adam":
        return torch.optim.Adam(model.parameters(), fused=True, **options)
    # Without tolerances, which would end its steps early at the small losses of float64.
    return torch.optim.LBFGS(
        model.parameters(),
        max_iter=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
        **options,
    )


def run(
    problem: str,
    name: str,
    options: Options,
    seed: int,
    seconds: float | None = None,
    passes: int | None = None,
    points: int | None = None,
    width: int | None = None,
    device: str = "cpu",
    shared: bool = False,
) -> Row:
    """Train for ``seconds``, evaluation excluded, or for so many ``passes``, and return the row.

    The network is evaluated at the first step's end past each point of the grid over the budget; a
    step of L-BFGS is 20 iterations and may pass several.
    """
    torch.manual_seed(seed)
    kind = PROBLEMS[problem]
    task, model = kind(seed, points, device), kind.network(width).to(device)
    opt = build(name, model, {k: v for k, v in options.items() if k != "cosine"})
    budget = passes or seconds
    assert budget is not None
    watch, gap = Stopwatch(torch.device(device)), budget / EVALUATIONS
    steps = closures = 0

    def closure() -> Tensor:
        nonlocal closures
        closures += 1
        opt.zero_grad()
        loss = task.loss(model)
        loss.backward()
        return loss

    def evaluated() -> tuple[float, float, float]:
        place = closures if passes else watch.seconds
        return place, float(task.loss(model).detach()), task.error(model)

    task.loss(model).backward()  # what the process's first pass costs is not the optimizer's
    curve = [evaluated()]
    while (place := curve[-1][0]) < budget and np.isfinite(curve[-1]).all():
        due = gap * (math.floor(place / gap) + 1)
        with watch:
            while (spent := closures if passes else watch.read()) < due:
                if options.get("cosine"):
                    anneal(opt, [options["lr"]] * len(opt.param_groups), spent / budget)
                opt.step(closure)
                steps += 1
        curve.append(evaluated())
    row = {
        "kind": "physics",
        "problem": problem,
        "points": len(task.inside),
        "width": model[0].out_features,
        "optimizer": name,
        "options": options,
        "setting": summary.point_text(options),
        "seed": seed,
        "seconds": seconds if passes is None else None,
        "passes": passes,
        "shared": shared,
        "dtype": "float64",
        **environment(device),
        "status": "complete" if np.isfinite(curve[-1]).all() else "diverged",
        "steps": steps,
        "closures": closures,
        "elapsed": watch.seconds,
        "curve": [[x if math.isfinite(x) else None for x in place] for place in curve],
        "counters": counters(opt),
    }
    error = errors_at(row, [budget])[0]
    return row | {"final_error": float(error) if math.isfinite(error) else None}


def errors_at(row: Row, places: Sequence[float]) -> np.ndarray:
    """The error after each of ``places`` in the row's unit, log-linear between evaluations;
    infinite where the run diverged."""
    names = ("place", "loss", "error")
    columns = dict(zip(names, map(list, zip(*row["curve"], strict=True)), strict=True))
    return summary.values_at(columns, places, "place", "error")


def unit(row: Row) -> str:
    """Of the row's budget."""
    return UNITS[0] if row["passes"] else UNITS[1]


def final_error(row: Row) -> float:
    """When the budget was spent; infinite where the run diverged."""
    return math.inf if row["final_error"] is None else row["final_error"]


def comparable(rows: Sequence[Row], problem: str, of: str) -> list[Row]:
    """The rows of the problem with a budget ``of`` seconds or passes, of one size, budget and
    machine: those of the newest."""
    rows = [row for row in rows if row["problem"] == problem and unit(row) == of]
    alike = ("points", "width", of)
    return [
        row
        for row in rows
        if all(row[key] == rows[-1][key] for key in alike) and same_machine(row, rows[-1])
    ]


def best(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Per optimizer the runs of the setting with the lowest median error at the end, among the
    settings of the most seeds; the lowest first."""
    found: dict[str, list[Row]] = {}
    for name in LOOKS:
        settings: dict[str, list[Row]] = {}
        for row in rows:
            if row["optimizer"] == name:
                settings.setdefault(row["setting"], []).append(row)
        most = max(map(len, settings.values()), default=0)
        full = [runs for runs in settings.values() if len(runs) == most]
        if full:
            found[name] = min(full, key=median_error)
    return dict(sorted(found.items(), key=lambda item: median_error(item[1])))


def median_error(rows: Sequence[Row]) -> float:
    """Of the errors at the end."""
    return statistics.median(map(final_error, rows))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the error over training, a column a problem and a row a unit of the budget: the median
    of the seeds of each optimizer's best setting, and their range."""
    units = [of for of in UNITS if any(unit(row) == of for row in rows)]
    names = [name for name in PROBLEMS if any(row["problem"] == name for row in rows)]
    size = 1 + 5 * len(names), 0.4 + 4.4 * len(units)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(units), len(names), squeeze=False)
    for line, of in zip(axes, units, strict=True):
        for axis, name in zip(line, names, strict=True):
            axis.set_title(PROBLEMS[name].title, loc="left", fontsize=11)
            panel(axis, comparable(rows, name, of))
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside right center", frameon=False, fontsize=10)
    figure.suptitle("Relative error of the solution", x=0.01, ha="left", fontweight="bold")
    last = rows[-1]
    note = (
        f"float64, full batch; {last['device']}, {last['threads']} threads, torch {last['torch']}"
    )
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def panel(axis: Axes, rows: Sequence[Row]) -> None:
    """One problem and unit."""
    if not rows:
        axis.set_axis_off()
        return
    of = unit(rows[-1])
    places = np.linspace(0, rows[-1][of], plots.POINTS)
    for name, runs in best(rows).items():
        errors, look = np.stack([errors_at(row, places) for row in runs]), LOOKS[name]
        axis.plot(places, np.median(errors, 0), look.line, color=look.colour, label=look.label)
        low, high = errors.min(0), errors.max(0)
        axis.fill_between(places, low, high, color=look.colour, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    axis.set_xlabel({"passes": "runs of the closure", "seconds": "seconds of training"}[of])
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.physics", description=__doc__)
    made.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    made.add_argument("--optimizers", nargs="+", choices=GRIDS, default=list(GRIDS))
    made.add_argument("--seconds", type=float, default=15.0, help="of training a run")
    made.add_argument("--passes", type=int, help="of training a run, in place of seconds")
    made.add_argument("--shared", action="store_true", help="note that the machine has other work")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--grid", action="store_true", help="run every setting of every optimizer")
    made.add_argument("--points", type=int, help="inside, default the problem's")
    made.add_argument("--width", type=int, help="of the hidden layers, default the problem's")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--threads", type=int, help="CPU threads, default torch's choice")
    made.add_argument("--out", type=Path, default=OUT, help="for physics.jsonl and physics/*.png")
    ours = made.add_argument_group("K-BFGS", "changes to the setting, or all settings, that run")
    for option in ("lr", "damping-a", "damping-g", "momentum", "pair-decay"):
        ours.add_argument(f"--{option}", type=float)
    ours.add_argument("--hessian-action", choices=("minibatch", "ema"))
    ours.add_argument("--step-length", choices=("direction", "balanced", "layer"))
    ours.add_argument("--cosine", action="store_true", default=None)
    return made


def settings(name: str, arguments: argparse.Namespace) -> list[Options]:
    """What ``name`` runs, each setting once."""
    chosen = GRIDS[name] if arguments.grid else GRIDS[name][:1]
    if name != "kbfgs":
        return list(chosen)
    flags = ("lr", "damping_a", "damping_g", "momentum", "pair_decay")
    flags += ("hessian_action", "step_length", "cosine")
    given = {key: value for key in flags if (value := getattr(arguments, key)) is not None}
    return list({summary.point_text(o | given): o | given for o in chosen}.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = parser().parse_args(argv)
    console = Console(stderr=True)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path, figure = arguments.out / "physics.jsonl", arguments.out / "physics" / "physics.png"
    # Seed by seed over all optimizers: a slow spell of the machine is shared.
    jobs = [
        (problem, seed, name, options)
        for problem in arguments.problems
        for seed in arguments.seeds
        for name in arguments.optimizers
        for options in settings(name, arguments)
    ]
    for problem, seed, name, options in track(
        jobs, "runs", console=console, refresh_per_second=REFRESH
    ):
        row = run(
            problem,
            name,
            options,
            seed,
            arguments.seconds,
            arguments.passes,
            arguments.points,
            arguments.width,
            arguments.device,
            arguments.shared,
        )
        store(path, [row], IDENTITY)
        console.print(
            f"{problem} {name} seed {seed} {row['setting']}: error {final_error(row):.3g} after"
            f" {row['steps']} steps, {row['closures']} passes, {row['elapsed']:.1f} s"
            f" ({row['status']})",
            highlight=False,
            soft_wrap=True,
        )
    plot(summary.read_rows(path), figure)
    console.print(f"written: {path}, {figure}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
