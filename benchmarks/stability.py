"""How often training survives: ``python -m benchmarks.stability``.

Trains the MNIST autoencoder from many seeds under several safeguards and writes a line per run:
losses after every epoch, steps undone, outcome. docs/safeguard.md is made from these rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.data import load
from benchmarks.optimizers import Settings
from benchmarks.records import Run
from benchmarks.training import Config, train
from kbfgs_ext import SafeguardRule

DEFAULTS = "the defaults"  # the constructor's, whatever the other arguments say
RULES: dict[str, bool | SafeguardRule] = {
    "off": False,
    "undo alone": SafeguardRule(shrink=1 - 1e-12, grow=1.0),
    "halve, grow 1.1": SafeguardRule(shrink=0.5, grow=1.1, sufficient=0),
    "halve, grow 1.5": SafeguardRule(shrink=0.5, grow=1.5, sufficient=0),
    "halve, grow 1.02": SafeguardRule(shrink=0.5, grow=1.02, sufficient=0),
    "0.7, grow 1.1": SafeguardRule(shrink=0.7, grow=1.1, sufficient=0),
    "0.25, grow 1.1": SafeguardRule(shrink=0.25, grow=1.1, sufficient=0),
    "halve, grow 1.1, half the slope": SafeguardRule(shrink=0.5, grow=1.1, sufficient=0.5),
}


def row(run: Run, rule: str) -> dict[str, Any]:
    """What is kept of a run."""
    payload = run.payload()
    last = payload["rows"][-1]
    return {
        "kind": "stability",
        "rule": rule,
        "optimizer": run.config.optimizer,
        "settings": payload["config"]["settings"],
        "seed": run.config.seed,
        "batch_size": run.config.batch_size,
        "dataset": run.dataset["label"],
        "status": run.status,
        "train_loss": [r["train_loss"] for r in payload["rows"][1:]],
        "test_loss": [r["test_loss"] for r in payload["rows"][1:]],
        "seconds": last["seconds"],
        "undone": last["counters"].get("undone"),
        **run.environment,
    }


def _numbers(text: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability", description=__doc__)
    rules = [*RULES, DEFAULTS]
    parser.add_argument("--rules", nargs="+", choices=rules, default=["off", "halve, grow 1.1"])
    parser.add_argument("--hessian-action", nargs="+", default=["ema", "minibatch"])
    parser.add_argument("--optimizer", choices=("kbfgs", "kbfgsl"), default="kbfgs")
    parser.add_argument("--seeds", type=_numbers, default=_numbers("0-5"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--damping", type=float, default=0.3)
    parser.add_argument("--damping-a", type=float)
    parser.add_argument("--damping-g", type=float)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=Path, help="folder with the MNIST files")
    parser.add_argument("--json", type=Path, required=True, help="append a line per run")
    args = parser.parse_args(arguments)
    console = Console(stderr=True)
    dataset = load("mnist", args.data)
    jobs = [(r, a, s) for r in args.rules for a in args.hessian_action for s in args.seeds]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for rule, action, seed in track(jobs, "runs", console=console):
        settings = Settings(hessian_action=action)
        if rule != DEFAULTS:
            settings = Settings(
                preset="published",
                lr=args.lr,
                damping=args.damping,
                damping_a=args.damping_a,
                damping_g=args.damping_g,
                hessian_action=action,
                safeguard=RULES[rule],
            )
        config = Config(
            optimizer=args.optimizer,
            settings=settings,
            epochs=args.epochs,
            seed=seed,
            threads=args.threads,
        )
        made = row(train(config, dataset), rule)
        made["settings"]["safeguard"] = rule
        losses = " ".join("-" if x is None else f"{x:.1f}" for x in made["train_loss"])
        console.print(f"{rule}, {action}, seed {seed}: {made['status']} {losses}")
        with args.json.open("a") as file:
            file.write(json.dumps(made) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
