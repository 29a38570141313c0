"""Tables in the documents, made from rows: ``python -m benchmarks.report``.

A table stands between ``<!-- rows: NAME -->`` and ``<!-- end -->`` in README.md or docs/*.md and is
written anew from ``benchmarks/results``; ``--check`` fails where that would change a document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import autoencoders, coverage, gpu, sixteen_bits, summary
from benchmarks import physics as physics_runs
from benchmarks.demo import TARGETS, seconds_to
from benchmarks.grids import GRIDS
from benchmarks.grids import TARGETS as TRAINING_TARGETS
from benchmarks.optimizers import QUASI_NEWTON
from benchmarks.plots import LOOKS
from benchmarks.step import kinds
from benchmarks.step.clock import PHASES
from benchmarks.step.models import MODELS
from benchmarks.summary import Row, Spread
from benchmarks.tables import RESULTS, lines_of, machine, markdown, number, significant
from benchmarks.tasks import blocks as tasks_blocks
from benchmarks.tasks import seconds as tasks_seconds
from benchmarks.tasks import sides as tasks_sides
from benchmarks.tasks import transfer
from benchmarks.tasks.table import tasks
from kbfgs_ext.bench.cases import APART, BLAS, COMPILED, EAGER, OURS

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- rows: (\S+) -->\n).*?(<!-- end -->)", flags=re.S)


def demo() -> str:
    """Final losses and seconds to fixed losses of the demo's runs."""
    runs = json.loads((RESULTS / "demo" / "demo.json").read_text())["runs"]
    heads = ["optimizer", "epochs", "seconds", "train", "test"]
    heads += [f"s to {target:g}" for target in TARGETS]
    body = []
    for run in runs:
        last = run["rows"][-1]
        body.append(
            [
                LOOKS[run["config"]["optimizer"]].label,
                str(last["epoch"]),
                number(last["seconds"]),
                number(last["train_loss"], 2),
                number(last["test_loss"], 2),
                *(number(seconds_to(run, target)) for target in TARGETS),
            ]
        )
    first = runs[0]
    return (
        markdown(heads, body)
        + f"\n{first['dataset']['label']}, batch {first['config']['batch_size']},"
        f" seed {first['config']['seed']}; {machine(first['environment'])}.\n"
    )


def step() -> str:
    """Milliseconds of a whole step of the MNIST autoencoder, and of its parts: on the last CPU, in
    fp32 and under bf16 autocast."""
    rows = [r for r in lines_of("step") if r["dataset"] == "mnist" and r["device_type"] == "cpu"]
    rows = [r for r in rows if r["precision"] in ("fp32", "bf16")]
    last = rows[-1]["device"]
    return _step_tables([row for row in rows if row["device"] == last], False)


def steps() -> str:
    """The same of every model, with spread and counts."""
    return _step_tables(lines_of("step"), True)


def _step_tables(rows: list[Row], whole: bool) -> str:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(
            (row["dataset"], row["precision"], row["device"], row["threads"]), []
        ).append(row)
    return "\n".join(_step_table(group, whole) for group in groups.values())


def _step_table(rows: list[Row], whole: bool) -> str:
    """One model on one machine; ``whole`` adds what a front page can do without."""
    first = rows[0]
    calls = "launches" if first["device_type"] == "cuda" else "ops"
    heads = ["step", "ms", *(["20-80 %"] if whole else []), "ratio", *PHASES]
    heads += [calls, "allocations", "MiB"] if whole else []
    body = []
    for row in rows:
        ms, phases = row["ms"], row["phases_ms"] or {}
        spread = [f"{significant(ms['q20'])}-{significant(ms['q80'])}"] if whole else []
        cells = [row["provider"], significant(ms["q50"]), *spread, number(row["ratio_to_eager"], 2)]
        cells += [significant(phases[p]) if p in phases else "–" for p in PHASES]
        body.append(cells + (_counts(row.get("counts"), calls) if whole else []))
    means = [f"{r['provider']} of {r['period']}" for r in rows if r.get("period", 1) > 1]
    note = f" Means over the steps of a period: {', '.join(means)}." if means else ""
    return markdown(heads, body) + (
        f"\nMedians of {first['rounds']} interleaved rounds, {MODELS[first['dataset']].title},"
        f" batch {first['batch_size']}, {first['precision']}; {machine(first)}.{note}\n"
    )


def _counts(counts: dict[str, float] | None, calls: str) -> list[str]:
    """Calls, allocations and MiB; rows of before there were counts have none."""
    if counts is None:
        return ["–"] * 3
    return [
        number(counts[calls], 0),
        number(counts["allocations"], 0),
        significant(counts["bytes"] / 2**20),
    ]


def micro() -> str:
    """Every kernel beside its alternatives: a table per device and state of the cache."""
    groups: dict[tuple, dict[tuple, dict[str, Row]]] = {}
    rows = lines_of("micro")
    for row in rows:
        if row["us"] is not None:
            group = groups.setdefault(
                (row["precision"], row["device"], row["threads"], row["cache"]), {}
            )
            group.setdefault((row["kernel"], row["shape"]), {})[row["provider"]] = row
    tables = [_micro_table(cases) for cases in groups.values()]
    return "\n".join(tables) or markdown(["kernel", "shape"], [])


def _micro_table(cases: dict[tuple, dict[str, Row]]) -> str:
    first = next(iter(next(iter(cases.values())).values()))
    heads = ["kernel", "shape", "eager us", "MiB", COMPILED, BLAS]
    for ours in OURS[first["device_type"]]:
        heads += [f"{ours} us", "MiB", "ratio", "apart", "rate", "of ceiling"]
    body = []
    for (kernel, shape), by in cases.items():
        cells = [kernel, shape, *_us_and_mib(by.get(EAGER)), _ratio(by, COMPILED), _ratio(by, BLAS)]
        for ours in OURS[first["device_type"]]:
            found = by.get(ours)
            cells += [*_us_and_mib(found), _ratio(by, ours), _ratio(by, ours + APART)]
            cells += [_rate(found), f"{100 * found['share_of_ceiling']:.0f} %"] if found else "––"
        body.append(cells)
    cache = {"cold": ", cold L2", "warm": ", warm L2"}.get(first["cache"], "")
    copy, product = (significant(first[f"ceiling_{x}_per_s"], 2) for x in ("gb", "tflop"))
    return markdown(heads, body) + (
        f"\nMedians of interleaved rounds{cache}, batch {first['batch_size']},"
        f" {first['precision']}, seed {first['seed']}; ceilings {copy} GB/s (copy) and"
        f" {product} TFLOP/s (product); {machine(first)}.\n"
    )


def _us_and_mib(row: Row | None) -> list[str]:
    return [significant(row["us"]["q50"]), number(row["peak_bytes"] / 2**20)] if row else ["–"] * 2


def _ratio(by: dict[str, Row], provider: str) -> str:
    return significant(by[provider]["ratio_to_eager"], 2) if provider in by else "–"


def _rate(row: Row) -> str:
    if row["bound"] == "memory":
        return f"{significant(row['gb_per_s'])} GB/s"
    return f"{significant(1e3 * row['tflop_per_s'])} GFLOP/s"


def stability() -> str:
    """Losses after the first two epochs, over the seeds, under each rule."""
    groups: dict[tuple, list[Row]] = {}
    for row in lines_of("stability"):
        s = row["settings"]
        key = (s["hessian_action"], row["rule"], s["lr"], s["damping"])
        groups.setdefault(key, []).append(row)
    heads = ["hessian_action", "safeguard", "lr", "damping", "seeds", "survived epoch 1"]
    heads += ["loss after it: median", "worst", "after epoch 2: median", "worst"]
    body = []
    for (action, rule, lr, damping), rows in sorted(groups.items(), key=lambda item: item[0]):
        after = [
            [r["train_loss"][i] for r in rows if len(r["train_loss"]) > i and survived(r, i)]
            for i in (0, 1)
        ]
        spread = [f(x) if x else None for x in after for f in (statistics.median, max)]
        count = f"{len(after[0])} of {len(rows)}"
        body.append([action, rule, f"{lr:g}", f"{damping:g}", str(len(rows)), count])
        body[-1] += [number(x) for x in spread]
    places = dict.fromkeys(f"{row['dataset']}; {machine(row)}" for row in lines_of("stability"))
    return markdown(heads, body) + "".join(f"\n{place}.\n" for place in places)


def survived(row: Row, epoch: int) -> bool:
    """Whether the loss is finite and below that of a network that says nothing."""
    loss = row["train_loss"][epoch]
    return loss is not None and loss < START


def safeguard() -> str:
    """Runs that are stable by themselves: where they end without the safeguard and with it."""
    ends: dict[tuple, dict[str, Row]] = {}
    for row in lines_of("stability"):
        s = row["settings"]
        key = (s["hessian_action"], s["lr"], s["damping"], row["seed"], len(row["train_loss"]))
        ends.setdefault(key, {})[row["rule"]] = row
    heads = ["hessian_action", "seed", "epochs", "loss without", "with", "difference", "undone"]
    body = []
    for (action, _, _, seed, epochs), rules in sorted(ends.items()):
        off, on = rules.get("off"), rules.get("halve, grow 1.1")
        if off and on and epochs > 1 and survived(off, -1):
            x, y = off["train_loss"][-1], on["train_loss"][-1]
            body.append([action, str(seed), str(epochs), number(x, 2), number(y, 2)])
            body[-1] += [f"{100 * (y / x - 1):+.1f} %", number(on["undone"], 0)]
    return markdown(heads, body)


def endurance() -> str:
    """What is left of a network after a wild setting, and how it recovers."""
    heads = ["method", "hessian_action", "steps", "void", "undone", "not finite"]
    heads += ["loss at first", "wild", "wild, inputs x 1000", "sane again", "after restart()"]
    heads += ["commit"]
    rows = lines_of("endurance")
    body = [
        [
            LOOKS[row["optimizer"]].label,
            row["hessian_action"],
            str(row["wild_steps"] + row["sane_steps"]),
            *(f"{row['counters'][name]:.0f}" for name in ("skipped", "undone")),
            str(row["broken_steps"]),
            *(significant(loss) for loss in row["loss"].values()),
            row["commit"][:10],
        ]
        for row in rows
    ]
    places = dict.fromkeys(machine(row) for row in rows)
    return markdown(heads, body) + "".join(f"\n{place}.\n" for place in places)


def compare() -> str:
    """The committed rows of ``benchmarks.compare``, a table and a figure per data set."""
    return comparison(summary.read_rows(RESULTS / "compare.jsonl"), "../benchmarks/results/compare")


def sufficient() -> str:
    """K-BFGS's runs of a comparison: with any decrease enough, and with half the slope."""
    files = ("compare_any_decrease", "compare_half_slope")
    before, after = (lines_of(name) for name in files)
    heads = ["data", "optimizer", "lr", "undone", "loss at the end", "lr, half the slope"]
    heads += ["undone", "loss at the end"]
    body, places = [], {}
    for data in dict.fromkeys(row["data"] for row in after):
        for name in QUASI_NEWTON:
            cells = []
            for file in (before, after):
                rows = [r for r in file if (r["data"], r["optimizer"]) == (data, name)]
                undone = statistics.median(r["counters"]["undone"] for r in rows)
                losses = Spread.of([summary.loss_at_budget(r) for r in rows])
                cells += [f"{rows[0]['point']['lr']:g}", f"{undone:g}", losses.text()]
                places |= dict.fromkeys(machine(r) for r in rows)
            body.append([data, LOOKS[name].label, *cells])
    return markdown(heads, body) + "".join(f"\n{place}.\n" for place in places)


def tuning() -> str:
    """Training loss of every point of K-BFGS's grid at the end of its tuning run, by data set."""
    groups = summary.groups(summary.read_rows(RESULTS / "compare.jsonl"))
    pairs = [(group, summary.tuning(group.rows, "kbfgs")) for group in groups]
    tuned = [(group, rows) for group, rows in pairs if rows]
    heads = [
        "settings",
        *(f"{group.last['data']}, {rows[0]['budget']:g} s" for group, rows in tuned),
    ]
    body = []
    for point in GRIDS["kbfgs"]:
        found = [[r for r in rows if r["point"] == point.given()] for _, rows in tuned]
        losses = [summary.loss_at_budget(rows[-1]) if rows else math.inf for rows in found]
        cells = [significant(loss) if math.isfinite(loss) else "–" for loss in losses]
        body.append([summary.point_text(point.given()), *cells])
    return markdown(heads, body) + "".join(
        f"\n{group.last['data']}: {machine(rows[0])}.\n" for group, rows in tuned
    )


def physics() -> str:
    """Errors of the physics-informed networks at the end: each optimizer's best setting."""
    heads = ["problem", "optimizer", "settings", "of", "seeds", "budget", "steps", "passes"]
    heads += ["error: median", "smallest", "largest"]
    rows, body, places = lines_of("physics"), [], {}
    for of, name in itertools.product(physics_runs.UNITS, physics_runs.PROBLEMS):
        group = physics_runs.comparable(rows, name, of)
        for optimizer, runs in physics_runs.best(group).items():
            tried = {r["setting"] for r in group if r["optimizer"] == optimizer}
            errors = Spread.of([physics_runs.final_error(r) for r in runs])
            counts = (statistics.median(r[key] for r in runs) for key in ("steps", "closures"))
            title, label = physics_runs.PROBLEMS[name].title, physics_runs.LOOKS[optimizer].label
            body.append([title, label, runs[0]["setting"]])
            body[-1] += [str(len(tried)), str(len(runs)), f"{runs[0][of]:g} {of}"]
            body[-1] += [f"{count:.0f}" for count in counts]
            body[-1] += [f"{x:.1e}" for x in (errors.median, errors.smallest, errors.largest)]
            shared = {True: ", beside other work", False: ""}
            places |= dict.fromkeys(f"{of}: {machine(r)}{shared[r['shared']]}" for r in runs)
    text = markdown(heads, body) + "".join(f"\n{place}.\n" for place in places)
    figure = "\n![Error against passes and seconds](../benchmarks/results/physics/physics.png)\n"
    return text + (figure if rows else "")


def comparison(rows: list[Row], figures: str | None = None) -> str:
    """Seconds and epochs to fixed losses, by data set; ``figures`` is the folder to link to."""
    return "\n".join(_comparison(group, figures) for group in summary.groups(rows))


def _comparison(group: summary.Group, figures: str | None) -> str:
    targets = TRAINING_TARGETS[group.last["dataset"]]
    heads = ["optimizer", "settings"]
    heads += [f"{unit} to {t:g}" for unit in ("s", "epochs") for t in targets]
    heads += [f"{part} at {group.last['budget']:g} s" for part in ("train", "test")]
    body = []
    for name, runs in group.ranked.items():
        spreads = [
            Spread.of([summary.crossing(run, target, axis) for run in runs])
            for axis in summary.AXES
            for target in targets
        ]
        spreads += [
            Spread.of([summary.loss_at_budget(run, key) for run in runs])
            for key in ("train_loss", "test_loss")
        ]
        cells = [spread.text() for spread in spreads]
        body.append([LOOKS[name].label, summary.point_text(runs[0]["point"]), *cells])
    machines = dict.fromkeys(machine(run) for runs in group.ranked.values() for run in runs)
    text = markdown(heads, body) + f"\n{group.conditions}; {'; '.join(machines)}.\n"
    if figures is not None:
        text += f"\n![Loss against seconds and epochs]({figures}/{group.name}.png)\n"
    return text


START = 543.4  # loss of a network that says nothing, 784 ln 2: a run that ends above has blown up

TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "step": step,
    "steps": steps,
    "micro": micro,
    "stability": stability,
    "safeguard": safeguard,
    "endurance": endurance,
    "compare": compare,
    "tuning": tuning,
    "sufficient": sufficient,
    "physics": physics,
    "tasks": tasks,
    "autoencoders": lambda: autoencoders.table(lines_of("autoencoders")),
    "tasks-seconds": tasks_seconds.table,
    "tasks-blocks": tasks_blocks.table,
    "tasks-sides": tasks_sides.table,
    "tasks-scales": transfer.scales,
    "tasks-widths": transfer.widths,
    "coverage": coverage.table,
    "kinds": kinds.table,
    "sixteen-bits": sixteen_bits.table,
    "gpu-steps": gpu.steps,
    "gpu-transformer": lambda: gpu.steps("transformer"),
    "gpu-training": gpu.training,
}


def render(text: str) -> str:
    """``text`` with every table made anew."""
    return PLACE.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    args = parser.parse_args(arguments)
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = path.read_text()
        new = render(old)
        if new != old:
            stale.append(path.name)
            if not args.check:
                path.write_text(new)
    print("stale: " + ", ".join(stale) if stale else "all tables are as the rows say")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
