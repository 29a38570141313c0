"""A model, measured: one row per provider."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.closures import Closure, stepper
from benchmarks.step.captured import captured
from benchmarks.step.clock import PHASES, PhaseClock
from benchmarks.step.counts import counts
from benchmarks.step.models import MODELS, Model
from benchmarks.step.providers import Provider
from kbfgs_ext import KBFGS
from kbfgs_ext.bench.environment import environment
from kbfgs_ext.bench.measure import QUANTILES, Row, quantile
from kbfgs_ext.bench.precision import PRECISIONS

SEED = 0  # of weights and whatever optimizers draw
Tick = Callable[[str], None]  # told the provider's name after every step


class Runner:
    """A provider at work on its own copy of the model."""

    def __init__(
        self, provider: Provider, model: Model, x: Tensor, tick: Tick, precision: str = "fp32"
    ) -> None:
        how = PRECISIONS[precision]
        self.provider, self._tick = provider, tick
        self._clock = PhaseClock(x.device)
        self.steps: list[dict[str, float]] = []  # seconds by phase
        self.loss = x.new_zeros(())  # of the last step
        torch.manual_seed(SEED)  # every provider starts from the same weights
        network = model.build().to(x.device, how.parameters)
        opt = provider.make(network, model.loss)

        def loss_of(x: Tensor) -> Tensor:
            with how.forward(x.device):
                outputs = network(x.to(how.parameters))
            return model.loss(outputs.float(), x)

        if provider.captured:
            step = captured(opt, loss_of)
        else:
            self._clock.watch(opt)

            def watched(closure: Closure) -> Closure:  # ours tells its two passes apart by itself
                return closure if isinstance(opt, KBFGS) else self._clock.timed(closure, PHASES[0])

            step = stepper(how, opt, loss_of, x.device, watched)
        self._step = lambda: step(x)
        for _ in range(provider.warm_up):
            self.step()
        self.counts = counts(self.step, provider.period, x.device)

    def step(self) -> None:
        """One step, timed."""

        def step() -> None:
            self.loss = self._step().detach()

        self.steps.append(self._clock.seconds(step))
        self._tick(self.provider.name)

    def readings(self) -> list[dict[str, float]]:
        """Seconds a step, by phase: the means of the periods."""
        period = self.provider.period
        return [
            {phase: sum(step.get(phase, 0.0) for step in steps) / period for phase in PHASES}
            for steps in (self.steps[i : i + period] for i in range(0, len(self.steps), period))
        ]

    def seconds(self) -> list[float]:
        """The readings whole."""
        return [sum(reading.values()) for reading in self.readings()]


def total(provider: Provider, rounds: int) -> int:
    """Timed steps of a provider: as many as there are rounds, made up to whole periods."""
    return provider.period * math.ceil(rounds / provider.period)


def companies(model: Model, others: Sequence[Provider]) -> list[Sequence[Provider]]:
    """Who is in memory together, beside the eager reference."""
    size = max(1, model.at_once - 1)
    return [others[i : i + size] for i in range(0, len(others), size)] or [()]


def length(model: Model, providers: Sequence[Provider], rounds: int) -> int:
    """Steps in all, as many as there are ticks."""
    first, *others = providers
    found = total(first, rounds) * (len(companies(model, others)) - 1)
    for provider in providers:  # ops and allocations are counted apart
        found += provider.warm_up + 2 * provider.period + total(provider, rounds)
    return found


def measure(
    name: str,
    providers: Sequence[Provider],
    device: torch.device,
    batch_size: int | None = None,
    rounds: int | None = None,
    tick: Tick = lambda name: None,
    precision: str = "fp32",
) -> list[Row]:
    """A row per provider: quantiles of the step, phases, counts, the ratio to the first provider.

    That is the eager reference. It takes turns with all the others, or with as many at a time as
    fit in memory, and each ratio is to its steps in the same rounds.
    """
    model = MODELS[name]
    rounds = rounds or model.rounds
    x = model.batch(batch_size or model.batch_size).to(device)
    about = {
        "kind": "step",
        "dataset": name,
        "batch_size": len(x),
        "precision": precision,
        "seed": SEED,
        "rounds": rounds,
    }
    first, *others = providers
    found: list[Row] = []
    with PRECISIONS[precision].set():
        eager = Runner(first, model, x, tick, precision)
        for company in companies(model, others):
            new = [Runner(provider, model, x, tick, precision) for provider in company]
            runners = [eager, *new]
            take_turns(runners, rounds)
            found += [figures(runner, eager) for runner in runners[bool(found) :]]
            del runners, new
            _free(device)
    here = environment(device)
    return [about | row | here for row in found]


def take_turns(runners: Sequence[Runner], rounds: int) -> None:
    """Rounds in which each runner takes its share of its steps."""
    for runner in runners:
        runner.steps.clear()
    for turn in range(1, rounds + 1):
        for runner in runners:
            while len(runner.steps) < total(runner.provider, rounds) * turn // rounds:
                runner.step()


def figures(runner: Runner, eager: Runner) -> Row:
    """What a runner's own steps say."""
    readings, seconds = runner.readings(), runner.seconds()
    phases = [p for p in PHASES if any(p in step for step in runner.steps)]
    loss = runner.loss.item()
    return {
        "provider": runner.provider.name,
        "period": runner.provider.period,
        "readings": len(readings),
        "ms": {f"q{100 * q:.0f}": 1e3 * quantile(seconds, q) for q in QUANTILES},
        "ratio_to_eager": quantile(seconds, 0.5) / quantile(eager.seconds(), 0.5),
        "phases_ms": {p: 1e3 * quantile([r[p] for r in readings], 0.5) for p in phases}
        if len(phases) > 1  # a graph has none
        else None,
        "counts": runner.counts,
        "loss": loss if math.isfinite(loss) else None,
    }


def _free(device: torch.device) -> None:
    """Give back what optimizers hold, whose hooks and models point at each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
