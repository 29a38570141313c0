"""The defaults on the paper's three autoencoders: ``python -m benchmarks.autoencoders --data DIR``.

Runs of equal numbers of epochs with a cosine from the learning rate to 0, K-BFGS as its constructor
makes it, Muon and AdamW over grids of five learning rates with seed 0. A run is a row, which is not
made again where it is there. FACES-like is a set a twentieth of the paper's size.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks import data
from benchmarks.optimizers import Settings
from benchmarks.progress import REFRESH
from benchmarks.summary import Row, Spread, read_rows
from benchmarks.tables import RESULTS, machine, markdown
from benchmarks.tasks.optimizers import LABELS
from benchmarks.tasks.runs import text
from benchmarks.training import Config, train
from kbfgs_ext.bench.environment import environment
from kbfgs_ext.bench.measure import store

OUT = RESULTS / "autoencoders.jsonl"
EPOCHS = {"mnist": 20, "curves": 20, "faces": 30}
BATCH = 1000
PATCHES = 20  # of each face: 5,000 images to train on
GRIDS: dict[str, tuple[float | None, ...]] = {
    "kbfgs": (None,),  # the defaults
    "muon": (0.005, 0.01, 0.02, 0.05, 0.1),
    "adamw": (3e-4, 1e-3, 2e-3, 5e-3, 1e-2),
}
SEEDS = {"kbfgs": (0, 1, 2), "muon": (0,), "adamw": (0,)}
IDENTITY = ("dataset", "optimizer", "lr", "seed", "epochs")


def run(config: Config, images: data.Dataset) -> Row:
    """Train and return the row."""
    done = train(config, images)
    end = done.rows[-1]
    return {
        "kind": "autoencoder",
        "dataset": config.dataset,
        "data": images.label,
        "optimizer": config.optimizer,
        "lr": config.settings.lr,
        "seed": config.seed,
        "epochs": config.epochs,
        "steps": end.steps,
        "status": done.status,
        **environment("cpu"),
        "curve": [[row.epoch, row.train_loss, row.test_loss, row.seconds] for row in done.rows],
        "config": asdict(config) | {"settings": done.payload()["config"]["settings"]},
    }


def final(row: Row, place: int = 1) -> float:
    """Training loss at the end, or test loss; infinite where the run diverged."""
    value = row["curve"][-1][place]
    return math.inf if row["status"] != "complete" or value is None else value


def table(rows: Sequence[Row]) -> str:
    """Per set every optimizer at its best learning rate, the lowest training loss first."""
    places: dict[str, None] = {}
    heads = ["images", "optimizer", "lr", "of", "seeds", "epochs", "train", "test"]
    body = []
    for name in EPOCHS:
        found = []
        for optimizer, grid in GRIDS.items():
            mine = [r for r in rows if (r["dataset"], r["optimizer"]) == (name, optimizer)]
            if not mine:
                continue
            best = min((r for r in mine if r["seed"] == 0), key=final)["lr"]
            found.append((optimizer, len(grid), [r for r in mine if r["lr"] == best]))
        for optimizer, size, runs in sorted(found, key=lambda one: spread(one[2]).median):
            rate = "the default" if runs[0]["lr"] is None else f"{runs[0]['lr']:g}"
            body.append([runs[0]["data"], LABELS[optimizer], rate, str(size), str(len(runs))])
            body[-1] += [str(runs[0]["epochs"]), *(text(spread(runs, k)) for k in (1, 2))]
            places |= dict.fromkeys(machine(row) for row in runs)
    return markdown(heads, body) + "".join(f"\n{place}.\n" for place in places)


def spread(runs: Sequence[Row], place: int = 1) -> Spread:
    """Of the ends of runs, over the seeds."""
    return Spread.of([final(row, place) for row in runs])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoencoders", description=__doc__)
    parser.add_argument("--datasets", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--optimizers", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--epochs", type=int, help="of a run, default 20, FACES 30")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--data", metavar="DIR", help="folder with full MNIST, and the ORL faces")
    parser.add_argument("--out", type=Path, default=OUT, help="the rows' file")
    asked = parser.parse_args(argv)
    console = Console(stderr=True)
    runs = [
        (dataset, optimizer, lr, seed)
        for dataset in asked.datasets
        for optimizer in asked.optimizers
        for lr in GRIDS[optimizer]
        for seed in SEEDS[optimizer]
    ]
    images: dict[str, data.Dataset] = {}
    for dataset, optimizer, lr, seed in track(
        runs, "runs", console=console, refresh_per_second=REFRESH
    ):
        epochs = asked.epochs or EPOCHS[dataset]
        wanted = dict(zip(IDENTITY, (dataset, optimizer, lr, seed, epochs), strict=True))
        if any(all(row[k] == v for k, v in wanted.items()) for row in read_rows(asked.out)):
            continue
        if dataset not in images:
            images[dataset] = data.load(dataset, asked.data, patches_per_image=PATCHES)
        config = Config(
            dataset=dataset, optimizer=optimizer, settings=Settings(lr=lr), epochs=epochs,
            schedule="cosine", batch_size=BATCH, seed=seed, device="cpu", threads=asked.threads,
        )  # fmt: skip
        row = run(config, images[dataset])
        store(asked.out, [row], IDENTITY)
        console.print(f"{wanted}: {final(row):.4g} / {final(row, 2):.4g}", highlight=False)
    print(table(read_rows(asked.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
