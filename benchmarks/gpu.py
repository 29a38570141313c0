"""Training on a GPU, steps as CUDA graphs: ``python -m benchmarks.gpu --data DIR``.

The paper's MNIST autoencoder for 20 epochs in TF32, a cosine of the learning rate for all: K-BFGS
as its constructor makes it, AdamW and Muon at several rates. Rows go to ``results/gpu.jsonl``, a
plot of one run of each beside them; tables in README.md and docs/gpu.md are made of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import data, plots
from benchmarks.optimizers import CAPTURED, Settings
from benchmarks.plots import LOOKS
from benchmarks.records import Run
from benchmarks.step.models import MODELS
from benchmarks.summary import Row
from benchmarks.tables import RESULTS, lines_of, machine, markdown, number, significant
from benchmarks.training import Config, train
from kbfgs_ext.bench.precision import PRECISIONS

EPOCHS = 20
RATES = {"adamw": (5e-4, 1e-3, 2e-3, 5e-3), "muon": (5e-3, 1e-2, 2e-2)}
SEEDS = {"kbfgs": (0, 1, 2), "kbfgsl": (0,)}
ANCHOR = "AdamW, fused, graph"  # ratios are to its step
STEPS = {  # of the table: what is measured, and what it is called there
    ANCHOR: "AdamW, fused, captured",
    "K-BFGS, defaults, auto, graph": "K-BFGS, captured",
    "K-BFGS(L), defaults, auto, graph": "K-BFGS(L), captured",
    "K-BFGS, minibatch, auto, graph": "K-BFGS, the paper's direction, captured",
    "K-BFGS, defaults, triton, graph": "K-BFGS, Triton alone, captured",
    "AdamW, fused": "AdamW, fused",
    "K-BFGS, defaults, auto": "K-BFGS",
    "Muon": "Muon (torch's)",
    "eager K-BFGS, ema, full second pass": "the paper's direction in plain PyTorch",
}


def configs() -> list[Config]:
    """All runs; Muon's steps are not captured: no graph follows its schedule."""

    def config(name: str, seed: int = 0, **settings: float) -> Config:
        return Config(
            optimizer=name, settings=Settings(**settings), epochs=EPOCHS, schedule="cosine",
            precision="tf32", captured=name in CAPTURED, seed=seed, device="cuda",
        )  # fmt: skip

    ours = [config(name, seed) for name, seeds in SEEDS.items() for seed in seeds]
    return ours + [config(name, lr=lr) for name, rates in RATES.items() for lr in rates]


def last(run: Row) -> Row:
    """The end of a run."""
    return run["rows"][-1]


def shown(runs: list[Row]) -> list[Row]:
    """One run of each optimizer: the median of the seeds, of the learning rate that ends lowest."""
    found: dict[str, dict[float, list[Row]]] = {}
    for run in runs:
        config = run["config"]
        rates = found.setdefault(config["optimizer"], {})
        rates.setdefault(config["settings"]["lr"], []).append(run)

    def loss(run: Row) -> float:
        return last(run)["train_loss"]

    middles = (
        [sorted(seeds, key=loss)[len(seeds) // 2] for seeds in rates.values()]
        for rates in found.values()
    )
    return [min(of_rates, key=loss) for of_rates in middles]


def training() -> str:
    """Losses at the end of every run, and its seconds."""
    heads = ["optimizer", "lr", "seed", "training loss", "test loss", "seconds", "ms a step"]
    runs = lines_of("gpu")
    body = []
    for run in runs:
        config, end, first = run["config"], last(run), run["rows"][1]
        # The first epoch compiles and captures.
        pace = (end["seconds"] - first["seconds"]) / (end["steps"] - first["steps"])
        losses = [number(end[key]) for key in ("train_loss", "test_loss")]
        body.append(
            [LOOKS[config["optimizer"]].label, f"{config['settings']['lr']:g}",
             str(config["seed"]), *losses, number(end["seconds"], 2), significant(1e3 * pace)]
        )  # fmt: skip
    first = runs[0]
    config = first["config"]
    return markdown(heads, body) + (
        f"\n{first['dataset']['label']}, batch {config['batch_size']}, {config['epochs']} epochs,"
        f" {config['precision']}, {config['schedule']}; {machine(first['environment'])}.\n"
    )


def steps(model: str = "mnist") -> str:
    """Milliseconds of a step of ``model`` by precision, and their ratio to AdamW's."""
    everything = [row for row in lines_of("step") if row["device_type"] == "cuda"]
    rows = [row for row in everything if row["dataset"] == model]
    found = {(row["provider"], row["precision"]): row["ms"]["q50"] for row in rows}
    used = [name for name in PRECISIONS if (ANCHOR, name) in found]
    heads = ["a step", *(head for name in used for head in (f"{name}, ms", "x AdamW"))]
    body = []
    for provider in [name for name in STEPS if any((name, how) in found for how in used)]:
        cells = [STEPS[provider]]
        for name in used:
            ms = found.get((provider, name))
            cells += ["–"] * 2 if ms is None else [
                significant(ms), number(ms / found[ANCHOR, name], 1)
            ]  # fmt: skip
        body.append(cells)
    first = rows[0]
    return markdown(heads, body) + (
        f"\nMedians of {first['rounds']} interleaved rounds, {MODELS[first['dataset']].title},"
        f" batch {first['batch_size']}; {machine(first)}.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--data", metavar="DIR", help="folder with full MNIST")
    parser.add_argument("--download", action="store_true", help="fetch full MNIST")
    parser.add_argument("--out", type=Path, default=RESULTS, help="for gpu.jsonl and gpu.png")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    images = data.load("mnist", options.data, download=options.download)
    console, runs = Console(), []
    for config in configs():
        run: Run = train(config, images)
        runs.append(run.payload())
        end = run.rows[-1]
        console.print(
            f"{config.optimizer} {config.settings.lr or ''}: {run.status}, training loss"
            f" {end.train_loss:.2f}, test loss {end.test_loss:.2f}, {end.seconds:.2f} s"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    rows = options.out / "gpu.jsonl"
    rows.write_text("".join(json.dumps(run) + "\n" for run in runs))
    plot(runs, options.out / "gpu.png")
    return 0


def plot(runs: list[Row], path: Path) -> None:
    """A run of each optimizer against seconds."""
    note = f"20 epochs each, captured but for Muon; {machine(runs[0]['environment'])}"
    title = f"{runs[0]['dataset']['label']}, autoencoder: {runs[0]['environment']['device']}"
    plots.loss_against_seconds(shown(runs), path, title, note)


if __name__ == "__main__":
    sys.exit(main())
