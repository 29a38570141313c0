"""Training in 16 bits beside 32: ``python -m benchmarks.sixteen_bits --data DIR``.

The paper's MNIST autoencoder for 10 epochs under a cosine of the learning rate, with the
constructor's settings: in float32, under autocast to bfloat16, and with bfloat16 parameters, these
with the optimizer's 32-bit copies and without them, where every step is rounded to 8 bits. Rows go
to ``results/sixteen_bits.jsonl``, a run as soon as it has ended; the table in docs/usage.md is made
of them. A run of the file is not repeated, so that a stopped command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import data
from benchmarks.optimizers import Settings
from benchmarks.progress import Display
from benchmarks.summary import Row, Spread
from benchmarks.tables import RESULTS, lines_of, machine, markdown
from benchmarks.training import Config, train

EPOCHS = 10
SEEDS = (0, 1, 2)
CASES = {  # what a row is called: the network's precision, the optimizer's settings
    "float32": ("fp32", Settings()),
    "autocast to bfloat16": ("bf16", Settings()),
    "bfloat16 parameters": ("bf16-params", Settings()),
    "the same, `master_weights=False`": ("bf16-params", Settings(master_weights=False)),
}


def config(case: str, seed: int) -> Config:
    """A run of the table."""
    precision, settings = CASES[case]
    return Config(
        settings=settings, epochs=EPOCHS, schedule="cosine", precision=precision, seed=seed
    )


def case_of(run: Row) -> str:
    """The name of the case that ``run`` belongs to."""
    wanted = (run["config"]["precision"], run["config"]["settings"]["master_weights"])
    return next(
        name
        for name, (precision, settings) in CASES.items()
        if (precision, settings.master_weights is not False) == wanted
    )


def table() -> str:
    """Losses at the end of the runs, beside those of float32 from the same seeds."""
    runs = lines_of("sixteen_bits")
    ends: dict[str, dict[int, Row]] = {name: {} for name in CASES}
    for run in runs:
        ends[case_of(run)][run["config"]["seed"]] = run["rows"][-1]
    anchors = next(iter(ends.values()))
    heads = ["parameters and passes", "training loss", "of float32's", "test loss", "of float32's"]
    body = []
    for name, rows in ends.items():
        cells = [name]
        for key in ("train_loss", "test_loss"):
            losses = {seed: row[key] for seed, row in rows.items()}
            shares = [loss / anchors[seed][key] for seed, loss in losses.items()]
            cells.append(Spread.of(list(losses.values())).text())
            cells.append(f"{min(shares):.4f} to {max(shares):.4f}")
        body.append(cells)
    first = runs[0]
    return markdown(heads, body) + (
        f"\n{first['dataset']['label']}, batch {first['config']['batch_size']}, {EPOCHS} epochs,"
        f" {first['config']['schedule']}; medians and ranges of {len(anchors)} seeds;"
        f" {machine(first['environment'])}.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sixteen_bits", description=__doc__)
    parser.add_argument("--data", metavar="DIR", help="folder with full MNIST")
    parser.add_argument("--download", action="store_true", help="fetch full MNIST")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=SEEDS, help="of weights and batches"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "sixteen_bits.jsonl")
    options = parser.parse_args(arguments)
    images = data.load("mnist", options.data, download=options.download)
    console = Console()
    for case, seed in ((case, seed) for seed in options.seeds for case in CASES):
        if (case, seed) in done(options.out):
            continue
        console.print(f"{case}, seed {seed}")
        run = train(config(case, seed), images, observer=Display(console))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.write(json.dumps(run.payload()) + "\n")
    return 0


def done(path: Path) -> set[tuple[str, int]]:
    """Cases and seeds of the runs in ``path``."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(case_of(run), run["config"]["seed"]) for run in map(json.loads, lines)}


if __name__ == "__main__":
    sys.exit(main())
