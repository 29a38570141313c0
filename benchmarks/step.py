"""Time of one whole training step, split into its parts: ``python -m benchmarks.step``.

Each provider is a way to take a step of the same autoencoder on the same batches; they take
turns, so that a noisy machine treats them alike, and every time is reported beside its ratio to
the eager reference: the method in plain PyTorch, with a full second pass.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.models import AUTOENCODERS
from kbfgs_ext import KBFGS, KBFGSL

EAGER = "eager K-BFGS, ema, full second pass"
PHASES = ("first pass", "second pass", "statistics", "direction", "curvature", "other")


@dataclasses.dataclass(frozen=True)
class Provider:
    """A named way to make the optimizer of a model."""

    name: str
    make: Callable[[torch.nn.Module], torch.optim.Optimizer]


def _kbfgs(method: type[KBFGS], **options: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda model: method(model, weight_decay=1e-5, **options)


_EAGER = {"backend": "reference", "freeze_second_pass": False}

PROVIDERS = (
    Provider(EAGER, _kbfgs(KBFGS, hessian_action="ema", **_EAGER)),
    Provider("eager K-BFGS, minibatch, full", _kbfgs(KBFGS, hessian_action="minibatch", **_EAGER)),
    Provider("K-BFGS, ema", _kbfgs(KBFGS, hessian_action="ema")),
    Provider("K-BFGS, minibatch", _kbfgs(KBFGS, hessian_action="minibatch")),
    Provider("K-BFGS(L), ema", _kbfgs(KBFGSL, hessian_action="ema")),
    Provider("K-BFGS(L), minibatch", _kbfgs(KBFGSL, hessian_action="minibatch")),
    Provider("AdamW, fused", lambda model: torch.optim.AdamW(model.parameters(), fused=True)),
    Provider("SGD", lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)),
)


class PhaseClock:
    """Seconds spent in each phase of a KBFGS step, by wrapping the optimizer's own methods."""

    def __init__(self, opt: torch.optim.Optimizer, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device = device
        if not isinstance(opt, KBFGS):
            return
        method = opt._method
        for owner, name, phase in (
            (method, "statistics", "statistics"),
            (method, "descend", "direction"),
            (method, "undo", "direction"),
            (method, "curvature_from_activations", "curvature"),
            (method, "curvature", "curvature"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), lambda *_, p=phase: p))
        opt._run = self._timed(opt._run, lambda _closure, which: which.value)

    def _timed(self, call: Callable[..., Any], phase_of: Callable[..., str]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now(self._device)
            result = call(*args, **kwargs)
            self.seconds[phase_of(*args)] += now(self._device) - start
            return result

        return timed


def now(device: torch.device) -> float:
    """Seconds, after everything queued on the device has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclasses.dataclass
class Runner:
    """One provider at work on its own copy of the model."""

    name: str
    step: Callable[[], Any]
    clock: PhaseClock
    seconds: list[float] = dataclasses.field(default_factory=list)
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def run(self, device: torch.device) -> None:
        """One timed step."""
        self.clock.seconds = dict.fromkeys(PHASES, 0.0)
        start = now(device)
        self.step()
        total = now(device) - start
        self.clock.seconds["other"] = total - sum(self.clock.seconds.values())
        self.seconds.append(total)
        self.phases.append(self.clock.seconds)


def make_runner(provider: Provider, dataset: str, batch: torch.Tensor) -> Runner:
    """The provider's model and optimizer, from the same seed as every other's."""
    torch.manual_seed(0)
    task = AUTOENCODERS[dataset]
    model = task.build().to(batch.device)
    opt = provider.make(model)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = task.loss(model(batch), batch)
        loss.backward()
        return loss

    return Runner(provider.name, lambda: opt.step(closure), PhaseClock(opt, batch.device))


def measure(
    dataset: str, batch_size: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row per provider: quantiles of the step, its phases, the ratio to the eager reference."""
    pixels = AUTOENCODERS[dataset].encoder[0]
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(batch_size, pixels, generator=generator).to(device)
    runners = [make_runner(p, dataset, batch) for p in PROVIDERS]
    for _ in range(3):  # start-up: allocation, the inverse, and caches
        for runner in runners:
            runner.run(device)
            runner.seconds.clear()
            runner.phases.clear()
    for _ in track(range(rounds), dataset, console=Console(stderr=True)):
        for runner in runners:
            runner.run(device)
    eager = _quantile(runners[0].seconds, 0.5)
    return [
        {
            "kind": "step",
            "dataset": dataset,
            "provider": runner.name,
            "batch_size": batch_size,
            "dtype": "float32",
            "seed": 0,
            "rounds": rounds,
            "ms": {f"q{int(100 * q)}": 1e3 * _quantile(runner.seconds, q) for q in (0.2, 0.5, 0.8)},
            "ratio_to_eager": _quantile(runner.seconds, 0.5) / eager,
            "phases_ms": {
                phase: 1e3 * _quantile([p[phase] for p in runner.phases], 0.5) for phase in PHASES
            }
            if any(runner.phases[0][p] for p in PHASES[:-1])
            else None,
            **environment(device),
        }
        for runner in runners
    ]


def _quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one data set for people."""
    first = rows[0]
    made = Table(
        title=f"{first['dataset']} autoencoder, batch {first['batch_size']}, float32,"
        f" {first['device']}, {first['threads']} threads: ms a step"
    )
    for name in ("provider", "median", "20-80%", "ratio", *PHASES):
        made.add_column(name, justify="left" if name == "provider" else "right")
    for row in rows:
        ms, phases = row["ms"], row["phases_ms"] or {}
        made.add_row(
            row["provider"],
            f"{ms['q50']:.1f}",
            f"{ms['q20']:.0f}-{ms['q80']:.0f}",
            f"{row['ratio_to_eager']:.2f}",
            *(f"{phases[p]:.1f}" if p in phases else "" for p in PHASES),
        )
    return made


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    yield
    torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--dataset", choices=AUTOENCODERS, nargs="+", default=["mnist"])
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="append the rows to this file, a line each")
    args = parser.parse_args(arguments)
    with _threads(args.threads):
        for dataset in args.dataset:
            rows = measure(dataset, args.batch_size, args.rounds, torch.device(args.device))
            Console(width=170).print(table(rows))
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                with args.json.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
