"""K-BFGS, K-BFGS(L) and AdamW on 5,000 digits, equal seconds: ``python -m benchmarks.demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.data import DataError, embedded_digits
from benchmarks.grids import GRIDS
from benchmarks.optimizers import Settings
from benchmarks.plots import LOOKS, loss_against_seconds
from benchmarks.progress import Display
from benchmarks.records import Run, write_json
from benchmarks.training import Config, train

OUT = Path(__file__).resolve().parent / "results" / "demo"

# Of training for each optimizer: three runs with evaluation end within three minutes on 2 cores.
CPU_SECONDS = 45.0
GPU_SECONDS = 10.0
BATCH = 1_000  # images, the paper's
EPOCHS = 10_000  # more than the seconds allow anywhere
TARGETS = (150.0, 120.0, 100.0, 80.0)  # training losses whose first sight is timed

CONTENDERS = {"kbfgs": Settings(), "kbfgsl": Settings(), "adamw": GRIDS["adamw"][0]}
TUNING = (
    "settings: the constructor's defaults; AdamW's lr the first of benchmarks/grids.py. All follow"
    " a cosine to 0. docs/choosing.md has optimizers that are tuned for each task"
)


def seconds_to(run: dict[str, Any], loss: float) -> float | None:
    """Training seconds until the first epoch with a training loss of at most ``loss``."""
    reached = (
        row["seconds"]
        for row in run["rows"]
        if row["train_loss"] is not None and row["train_loss"] <= loss
    )
    return next(reached, None)


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Final losses and the seconds to reach fixed training losses."""
    made = Table(
        title="Loss of the MNIST autoencoder after equal seconds of training",
        box=SIMPLE_HEAD,  # narrow enough for 80 columns
    )
    made.add_column("optimizer", no_wrap=True)
    targets = (f"s to\n{target:g}" for target in TARGETS)
    for heading in ("epochs", "seconds", "train", "test", *targets):
        made.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        last = run["rows"][-1]
        losses = (
            "-" if last[key] is None else f"{last[key]:.2f}" for key in ("train_loss", "test_loss")
        )
        times = (seconds_to(run, target) for target in TARGETS)
        made.add_row(
            LOOKS[run["config"]["optimizer"]].label,
            str(last["epoch"]),
            f"{last['seconds']:.1f}",
            *losses,
            *("-" if seconds is None else f"{seconds:.1f}" for seconds in times),
        )
    return made


def run_all(
    out: Path, console: Console, seconds: float | None, seed: int, device: str
) -> list[Run]:
    """Train the contenders one after the other; ``out`` holds JSON and plot after each of them.

    ``seconds`` of training each; None: 45 on a CPU, 10 on a GPU.
    """
    dataset = embedded_digits()
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if seconds is None:
        seconds = GPU_SECONDS if on_gpu else CPU_SECONDS
    console.print(dataset.summary, highlight=False, soft_wrap=True)
    runs: list[Run] = []
    for name, settings in CONTENDERS.items():
        config = Config(
            optimizer=name,
            settings=settings,
            epochs=EPOCHS,
            batch_size=BATCH,
            max_seconds=seconds,
            schedule="cosine",
            seed=seed,
            device=device,
        )
        runs.append(train(config, dataset, observer=Display(console, every=10)))
        payloads = [run.payload() for run in runs]
        write_json(out / "demo.json", {"tuning": TUNING, "runs": payloads})
        machine = runs[-1].environment
        loss_against_seconds(
            payloads,
            out / "demo.png",
            f"Autoencoder 784-1000-500-250-30, {dataset.label}",
            f"batch {config.batch_size:,}, seed {seed}, {machine['device']}, "
            f"{machine['threads']} threads, torch {machine['torch']}",
        )
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for demo.json and demo.png")
    parser.add_argument("--seconds", type=float, help="of training for each optimizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        runs = run_all(arguments.out, console, arguments.seconds, arguments.seed, arguments.device)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    console.print(table([run.payload() for run in runs]))
    console.print(TUNING, highlight=False, style="dim")
    console.print(f"written: {arguments.out / 'demo.json'}, {arguments.out / 'demo.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
