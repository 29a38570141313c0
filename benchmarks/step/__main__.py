"""Time of one whole training step, split into its parts: ``python -m benchmarks.step``.

Each provider is a way to take a step of the same network on the same batch; they take turns, so
that a noisy machine treats them alike, and every time is reported beside its ratio to the eager
reference: the method in plain PyTorch, with a full second pass. What a step dispatches, launches
and allocates is counted in steps that are not timed. ``--model-only`` times nothing: it prints what
a step should take on an H100 by its launches, bytes and FLOPs (prediction.py). ``--kernels`` says,
on a GPU, which kernels a step's time goes to (kernels.py).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.step import kernels, prediction
from benchmarks.step.clock import PHASES
from benchmarks.step.measure import length, measure
from benchmarks.step.models import MODELS
from benchmarks.step.providers import Provider, chosen, providers
from kbfgs_ext.bench.measure import Row, store
from kbfgs_ext.bench.precision import PRECISIONS


def table(rows: list[Row]) -> Table:
    """The rows of one model for people."""
    first = rows[0]
    made = Table(
        title=f"{MODELS[first['dataset']].title}, batch {first['batch_size']},"
        f" {first['precision']}, {first['device']}, {first['threads']} threads: ms a step"
    )
    calls = "launches" if first["device_type"] == "cuda" else "ops"
    heads = ["provider", "median", "20-80%", "ratio", *PHASES, calls, "allocations", "MiB"]
    for name in heads:
        made.add_column(name, justify="left" if name == "provider" else "right")
    for row in rows:
        ms, phases, counts = row["ms"], row["phases_ms"] or {}, row["counts"]
        made.add_row(
            row["provider"],
            f"{ms['q50']:.1f}",
            f"{ms['q20']:.0f}-{ms['q80']:.0f}",
            f"{row['ratio_to_eager']:.2f}",
            *(f"{phases[p]:.1f}" if p in phases else "" for p in PHASES),
            f"{counts[calls]:.0f}",
            f"{counts['allocations']:.0f}",
            f"{counts['bytes'] / 2**20:.1f}",
        )
    return made


def predicted(name: str, size: int | None) -> Table:
    """What the steps of one model should take; measured on no GPU."""
    model = MODELS[name]
    made = Table(
        title=f"{model.title}, batch {size or model.batch_size}, fp32: predicted for an H100,"
        " not measured"
    )
    for head in prediction.HEADS:
        made.add_column(head, justify="right" if head else "left")
    for row in prediction.rows(prediction.predictions(model, size)):
        made.add_row(*row)
    return made


def run(
    name: str, precision: str, args: argparse.Namespace, everyone: tuple[Provider, ...]
) -> list[Row]:
    """Measure one model, print its table and who is not in it."""
    console = Console(width=190)
    scaled = PRECISIONS[precision].scaled
    able, left_out = chosen(everyone, args.providers, MODELS[name], args.device, args.all, scaled)
    for provider, reason in left_out.items():
        console.print(f"{name}: {provider} is left out: {reason}", markup=False, soft_wrap=True)
    columns = TextColumn("{task.description:50}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        steps = length(MODELS[name], able, args.rounds or MODELS[name].rounds)
        bar = progress.add_task(name, total=steps)
        rows = measure(
            name,
            able,
            args.device,
            args.batch_size,
            args.rounds,
            lambda who: progress.update(bar, advance=1, description=f"{name}: {who}"),
            precision,
        )
    console.print(table(rows))
    for row in rows:
        if row["loss"] is None:
            console.print(f"{name}: {row['provider']} has diverged: its times are those of NaN")
    return rows


def launched(
    name: str, precision: str, args: argparse.Namespace, everyone: tuple[Provider, ...]
) -> None:
    """Print where the GPU's time goes in the steps of one model."""
    console, model = Console(width=110), MODELS[name]
    scaled = PRECISIONS[precision].scaled
    able, _ = chosen(everyone, args.providers, model, args.device, args.all, scaled)
    x = model.batch(args.batch_size or model.batch_size).to(args.device)
    with PRECISIONS[precision].set():
        for provider in able:
            row = kernels.kernels(provider, model, x, precision)
            console.print(kernels.table(row, f"{model.title}, {precision}"))


def positive(text: str) -> int:
    """A number of rounds, inputs or threads."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["mnist"])
    parser.add_argument(
        "--providers", nargs="+", default=[], metavar="WORD", help="only names that hold a word"
    )
    parser.add_argument("--all", action="store_true", help="even what takes minutes on a CPU")
    parser.add_argument("--batch-size", type=positive, help="inputs; a transformer's are sequences")
    parser.add_argument("--rounds", type=positive, help="steps of each; the model's own number")
    parser.add_argument("--threads", type=positive)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        nargs="+",
        default=["fp32"],
        help="all but fp32 allow TF32 in float32 products; bf16 and fp16 are autocast, the losses"
        " of fp16 scaled",
    )
    parser.add_argument(
        "--model-only", action="store_true", help="predict the steps on an H100, and run none"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="time the kernels of a step by name, on a GPU"
    )
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    parser.add_argument(
        "--json", type=Path, help="write the rows here, in place of the model's older ones"
    )
    args = parser.parse_args(arguments)
    if args.model_only:
        for name in args.model:
            Console(width=190).print(predicted(name, args.batch_size))
        return 0
    everyone = providers(args.device)
    for word in args.providers:
        if not any(provider.answers([word]) for provider in everyone):
            names = "; ".join(provider.name for provider in everyone)
            parser.error(f"--providers: no name holds {word!r}: {names}")
    if args.kernels and args.device.type != "cuda":
        parser.error(f"--kernels: kernels run on a GPU, the device is {args.device}")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        for name, precision in itertools.product(args.model, args.precision):
            if args.kernels:
                launched(name, precision, args, everyone)
                continue
            rows = run(name, precision, args, everyone)
            if args.json:
                store(args.json, rows, ("dataset", "precision"))
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
