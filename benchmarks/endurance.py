"""A setting that no one should use, then a sane one: ``python -m benchmarks.endurance``.

The demo's network on its digits at lr 3 and damping 1e-6, the inputs scaled by 1e3 half-way, and a
NaN in 1% of the batches; after that at the defaults, with clean inputs. A weight or factor that is
not finite is counted after every step, and the losses tell whether training recovers: by itself,
and, from the same wild end, after ``opt.restart()``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.data import embedded_digits
from benchmarks.models import AUTOENCODERS, Loss
from benchmarks.optimizers import options_of
from kbfgs_ext import KBFGS, KBFGSL, presets
from kbfgs_ext.bench.environment import environment

OUT = Path(__file__).resolve().parent / "results" / "endurance.jsonl"
METHODS: dict[str, type[KBFGS]] = {"kbfgs": KBFGS, "kbfgsl": KBFGSL}
# The paper's direction, whose steps no length bounds.
OPTIONS = presets.PUBLISHED | {"safeguard": True}
WILD = {"lr": 3.0, "damping": 1e-6}
SANE = {"lr": 0.3, "damping": 0.3}
INPUT_SCALE = 1e3  # in the second half of the wild steps
POISONED = 0.01  # of the wild batches have a NaN


@dataclass
class Outcome:
    """What a run has shown."""

    losses: list[float]  # of each step's first pass, wild and sane
    restarted: list[float]  # of the sane steps after a restart instead
    broken: int  # steps after which a weight or a kept tensor was not finite
    counters: dict[str, float]
    diagnostics: dict[str, dict[str, int]]

    def mean_loss(self, first: int, last: int) -> float:
        """Over the steps from ``first`` to ``last`` whose loss was finite."""
        return _mean(self.losses[first:last])


def endure(
    model: nn.Module,
    opt: KBFGS,
    batch: Callable[[torch.Generator], Tensor],
    loss_of: Loss,
    wild_steps: int,
    sane_steps: int,
    seed: int = 0,
    steps: Callable[[range], Any] = iter,
) -> Outcome:
    """Train an autoencoder at `WILD`, then at `SANE`, and from the same wild end at `SANE` after a
    restart; ``batch`` draws its (m, d) pixels."""
    random = torch.Generator().manual_seed(seed)
    broken = torch.zeros((), dtype=torch.int64, device=opt.device)
    total = wild_steps + sane_steps
    losses = torch.zeros(total + sane_steps, dtype=torch.float64, device=opt.device)
    for k in steps(range(total + sane_steps)):
        wild = k < wild_steps
        if k == wild_steps:
            end = copy.deepcopy((model.state_dict(), opt.state_dict(), random.get_state()))
        if k == total:
            counters, diagnostics = opt.counters(), opt.diagnostics()
            model.load_state_dict(end[0])
            opt.load_state_dict(end[1])
            random.set_state(end[2])
            opt.restart()
        for group in opt.param_groups:
            group.update(WILD if wild else SANE)
        pixels = batch(random)
        inputs = pixels * (INPUT_SCALE if wild and 2 * k >= wild_steps else 1.0)
        if wild and torch.rand((), generator=random) < POISONED:
            inputs[0, 0] = math.nan

        def closure(inputs: Tensor = inputs, pixels: Tensor = pixels) -> Tensor:
            opt.zero_grad()
            loss = loss_of(model(inputs), pixels)
            loss.backward()
            return loss

        losses[k] = opt.step(closure).detach()
        broken += ~_finite(model, opt)
    values = losses.tolist()
    return Outcome(
        values[:total],
        values[total:],
        int(broken),
        {name: value.item() for name, value in counters.items()},
        {
            layer: {name: int(value) for name, value in counts.items()}
            for layer, counts in diagnostics.items()
        },
    )


def _mean(losses: list[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / max(len(finite), 1)


def _finite(model: nn.Module, opt: KBFGS) -> Tensor:
    """Whether every weight and every kept tensor is finite; a bool scalar on the device."""
    state = (t for layer in opt.layers for t in layer.kept.values())
    tensors = [*model.parameters(), *(t for t in state if t.is_floating_point())]
    return torch.stack([torch.isfinite(t).all() for t in tensors]).all()


def measure(
    name: str,
    hessian_action: str,
    restart_after: int | None,
    wild_steps: int,
    sane_steps: int,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """The row of a run."""
    images, task = embedded_digits().train, AUTOENCODERS["mnist"]
    torch.manual_seed(seed)
    model = task.build()
    options = WILD | {"hessian_action": hessian_action, "restart_after": restart_after}
    opt = METHODS[name](model, **options_of(options, OPTIONS))
    started = time.perf_counter()
    done = endure(
        model,
        opt,
        lambda random: images[torch.randint(len(images), (200,), generator=random)],
        task.loss,
        wild_steps,
        sane_steps,
        seed,
        lambda steps: track(steps, f"{name}, {hessian_action}", console=console),
    )
    half, total = wild_steps // 2, wild_steps + sane_steps
    return {
        "kind": "endurance",
        "optimizer": name,
        "hessian_action": hessian_action,
        "restart_after": restart_after,
        "seed": seed,
        "batch_size": 200,
        "wild_steps": wild_steps,
        "sane_steps": sane_steps,
        "wild": WILD,
        "sane": SANE,
        "input_scale": INPUT_SCALE,
        "poisoned": POISONED,
        "broken_steps": done.broken,
        "loss": {
            "first": done.mean_loss(0, 10),
            "wild": done.mean_loss(half - 50, half),
            "wild_scaled": done.mean_loss(wild_steps - 50, wild_steps),
            "sane": done.mean_loss(total - 50, total),
            "sane_restarted": _mean(done.restarted[-50:]),
        },
        "counters": done.counters,
        "diagnostics": done.diagnostics,
        "seconds": time.perf_counter() - started,
        **environment(),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="at the wild setting")
    parser.add_argument("--sane-steps", type=int, default=1_000, help="at the sane one, after it")
    parser.add_argument("--optimizer", choices=METHODS, nargs="+", default=["kbfgs"])
    parser.add_argument(
        "--hessian-action", choices=("ema", "minibatch"), nargs="+", default=["minibatch"]
    )
    parser.add_argument("--restart-after", type=int, default=10, help="0: never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=OUT, help="append the rows to this file")
    args = parser.parse_args(arguments)
    console = Console(stderr=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in args.optimizer:
        for action in args.hessian_action:
            row = measure(
                name,
                action,
                args.restart_after or None,
                args.steps,
                args.sane_steps,
                args.seed,
                console,
            )
            console.print(f"{name}, {action}: broken {row['broken_steps']}, loss {row['loss']}")
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
            failed |= row["broken_steps"] > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
