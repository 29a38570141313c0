"""One training run as a function: data, model, optimizer, a row per epoch, a JSON file.

The command line (``train.py``), the demo and the comparisons all call :func:`train`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import optimizers, ranks
from benchmarks.closures import stepper
from benchmarks.data import Dataset
from benchmarks.models import AUTOENCODERS, Loss
from benchmarks.optimizers import Settings
from benchmarks.records import Row, Run, write_json
from benchmarks.step.captured import captured
from kbfgs_ext.bench.environment import environment
from kbfgs_ext.bench.precision import PRECISIONS

SCHEDULES = ("constant", "cosine")
EVALUATION_BATCH = 1_000  # images; the published notebook averages over batches of this size
# Reading the loss waits for the device, so it is done this seldom. It feeds the progress display
# and ends a diverged run inside its epoch.
READ_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class Config:
    """What is trained, how, and for how long."""

    dataset: str = "mnist"
    optimizer: str = "kbfgs"
    settings: Settings = field(default_factory=Settings)  # None inside: the optimizer's default
    epochs: int = 20
    max_seconds: float | None = None  # of training; a run ends at the first evaluation after them
    evaluate_every: int | None = None  # steps inside an epoch; every epoch's end is evaluated too
    batch_size: int = 1_000  # images, the paper's
    weight_decay: float = 1e-5  # the paper's
    warm_start: bool = True  # factors start from all training batches, as in the paper
    schedule: str = "constant"  # of lr; "cosine": to 0 at the end of the seconds, or the epochs
    precision: str = "fp32"  # one of `PRECISIONS`; losses are evaluated in fp32 products
    captured: bool = False  # steps as CUDA graphs, by those that can
    seed: int = 0
    device: str = "auto"  # auto: the GPU if there is one
    threads: int | None = None  # of the CPU; None: as torch has it

    def __post_init__(self) -> None:
        if self.dataset not in AUTOENCODERS:
            known = ", ".join(AUTOENCODERS)
            raise ValueError(f"dataset must be one of {known}, got {self.dataset!r}")
        for name, smallest in (("epochs", 0), ("batch_size", 1), ("weight_decay", 0)):
            value = getattr(self, name)
            if not value >= smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision must be one of {known}, got {self.precision!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {self.evaluate_every}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be above 0, got {self.max_seconds}")


class Observer:
    """Told what happens during a run; does nothing by itself."""

    def started(self, run: Run, steps_per_epoch: int) -> None:
        """Model and data are ready."""

    def stepped(self, steps: int, seconds: float, loss: float) -> None:
        """At most every ``READ_EVERY`` seconds: steps, training seconds, loss of the last batch."""

    def evaluated(self, row: Row) -> None:
        """An epoch, or the start, was evaluated."""

    def ended(self, run: Run) -> None:
        """The run is over, for whatever reason; ``run.status`` says which."""


class Stopwatch:
    """Seconds spent inside its ``with`` blocks, with the device drained on both sides."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._start = 0.0

    def _drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> Stopwatch:
        self._drain()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._drain()
        self.seconds += time.perf_counter() - self._start

    def read(self) -> float:
        """Seconds so far, from inside a ``with`` block and without waiting for the device."""
        return self.seconds + time.perf_counter() - self._start


def train(
    config: Config,
    dataset: Dataset,
    *,
    observer: Observer | None = None,
    json_path: str | Path | None = None,
) -> Run:
    """Train the autoencoder of ``config.dataset`` on ``dataset`` and return the run.

    ``json_path`` is written after every epoch and whenever the run ends, an interruption or an
    exception (both are passed on) included. A loss that is not finite ends the run as
    ``diverged``. Seeds the global generator and sets torch's thread count if one is configured.
    """
    observer = observer or Observer()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    steps_per_epoch = len(dataset.train) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"batch_size {config.batch_size} is larger than the training set ({len(dataset.train)})"
        )
    ranks.check(config.optimizer, config.batch_size, config.max_seconds)
    settings = optimizers.settle(config.optimizer, config.settings)
    torch.manual_seed(config.seed)
    autoencoder = AUTOENCODERS[config.dataset]
    optimizers.check_scaled(config.optimizer, config.precision, config.captured)
    if config.captured and device.type != "cuda":
        raise ValueError(f"captured steps are CUDA graphs, the device is {device}")
    model = autoencoder.build()  # on the CPU: the same weights on every device
    model.to(device, PRECISIONS[config.precision].parameters)
    network = ranks.wrapped(model)
    optimizer = optimizers.build(
        config.optimizer, network, settings, config.weight_decay, autoencoder.loss, config.captured
    )
    run = Run(
        config=config,
        settings=optimizers.resolved(config.optimizer, optimizer, settings),
        dataset={
            "label": dataset.label,
            "provenance": dataset.provenance,
            "train": len(dataset.train),
            "test": len(dataset.test),
        },
        environment=environment(device),
    )
    loop = _Loop(
        run=run,
        model=model,
        network=network,
        optimizer=optimizer,
        loss=autoencoder.loss,
        train=dataset.train.to(device),
        test=dataset.test.to(device),
        watch=Stopwatch(device),
        shuffle=torch.Generator().manual_seed(config.seed),
        observer=observer,
        json_path=Path(json_path) if json_path is not None and ranks.leads() else None,
    )
    observer.started(run, steps_per_epoch)
    try:
        with PRECISIONS[config.precision].set():
            loop.run_all()
    finally:
        loop.save()
        observer.ended(run)
    return run


@dataclass
class _Loop:
    """The moving parts of one run."""

    run: Run
    model: nn.Module
    network: nn.Module  # the model as it is trained: with others, by several processes
    optimizer: Any
    loss: Loss
    train: Tensor  # (N, d), on the device
    test: Tensor  # (N_test, d), on the device
    watch: Stopwatch
    shuffle: torch.Generator
    observer: Observer
    json_path: Path | None
    steps: int = 0
    rates: list[float] = field(default_factory=list)  # that a schedule starts from
    last_read: float = 0.0  # training seconds when the loss was last read

    def run_all(self) -> None:
        """Warm start and all epochs; sets ``run.status``."""
        config = self.run.config
        self.evaluate(0)
        if config.warm_start and hasattr(self.optimizer, "warm_start"):
            with self.watch:
                dtype = PRECISIONS[config.precision].parameters
                whole = batches(self.train, config.batch_size)
                self.optimizer.warm_start(ranks.part(images).to(dtype) for images in whole)
            self.run.warm_start_seconds = self.watch.seconds
        for epoch in range(config.epochs):
            self.epoch(epoch)
            if self.run.status == "diverged":
                return
            if self.spent:
                break
        self.run.status = "complete"

    @property
    def spent(self) -> bool:
        """Whether the seconds of training have run out."""
        return self.watch.seconds >= (self.run.config.max_seconds or math.inf)

    def epoch(self, before: int) -> None:
        """One pass over the shuffled training set, after ``before`` others, with its evaluations.

        It ends early when the loss is seen not finite or the seconds have run out. Images that do
        not fill a last batch are left for another epoch.
        """
        size = self.run.config.batch_size
        order = torch.randperm(len(self.train), generator=self.shuffle).to(self.train.device)
        orders = list(batches(order, size))  # of each step
        part = self.run.config.evaluate_every or len(orders)
        for first in range(0, len(orders), part):
            chosen = orders[first : first + part]
            with self.watch:
                self.descend(self.train[rows] for rows in chosen)
            done = first + len(chosen)
            self.evaluate(before + (1 if done == len(orders) else done / len(orders)))
            if self.run.status == "diverged" or self.spent:
                return

    def descend(self, images_of_steps: Iterable[Tensor]) -> None:
        """A step on each batch, given up at a loss seen not finite."""
        for images in map(ranks.part, images_of_steps):
            self.set_lr()
            loss = self.step(images)
            self.steps += 1
            seconds = self.watch.read()
            if seconds - self.last_read >= READ_EVERY:
                self.last_read = seconds
                value = float(loss.detach())
                self.observer.stepped(self.steps, seconds, value)
                if not math.isfinite(value) and ranks.size() == 1:  # others may not see it
                    self.run.status = "diverged"
                    return

    @functools.cached_property
    def step(self) -> Callable[[Tensor], Tensor]:
        """A step of the optimizer on a batch; the loss."""
        if self.run.config.captured:
            return captured(self.optimizer, self.loss_of)
        how = PRECISIONS[self.run.config.precision]
        return stepper(how, self.optimizer, self.loss_of, self.watch.device)

    def loss_of(self, images: Tensor) -> Tensor:
        """The mean loss of a batch."""
        how = PRECISIONS[self.run.config.precision]
        with how.forward(images.device):
            outputs = self.network(images.to(how.parameters))
        return self.loss(outputs.float(), images)

    def set_lr(self) -> None:
        """That of the step which comes next."""
        config = self.run.config
        if config.schedule == "constant":
            return
        if not self.rates:
            self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if config.max_seconds is not None:
            share = self.watch.read() / config.max_seconds
        else:
            share = self.steps / (config.epochs * (len(self.train) // config.batch_size))
        optimizers.anneal(self.optimizer, self.rates, share)

    def evaluate(self, epoch: float) -> None:
        """Add the row of ``epoch`` and save; the run has diverged if a loss is not finite."""
        penalty = weight_penalty(self.model, self.run.config.weight_decay)
        row = Row(
            epoch=epoch,
            steps=self.steps,
            train_loss=mean_loss(self.model, self.loss, self.train) + penalty,
            test_loss=mean_loss(self.model, self.loss, self.test) + penalty,
            seconds=self.watch.seconds,
            counters=counters(self.optimizer) if self.steps else {},
        )
        self.run.rows.append(row)
        if not (math.isfinite(row.train_loss) and math.isfinite(row.test_loss)):
            self.run.status = "diverged"
        self.save()
        self.observer.evaluated(row)

    def save(self) -> None:
        """Write the JSON file, if one is wanted."""
        if self.json_path is not None:
            write_json(self.json_path, self.run.payload())


def batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Full batches of ``size`` rows; the rest is dropped."""
    for start in range(0, len(rows) - size + 1, size):
        yield rows[start : start + size]


@torch.no_grad()
def mean_loss(model: nn.Module, loss: Loss, images: Tensor) -> float:
    """Mean over ``images`` of the loss per image, without weight decay."""
    total = torch.zeros((), dtype=torch.float64, device=images.device)
    dtype = next(model.parameters()).dtype
    with PRECISIONS["fp32"].set():
        for batch in images.split(EVALUATION_BATCH):
            total += loss(model(batch.to(dtype)).float(), batch).double() * len(batch)
    return float(total) / len(images)


@torch.no_grad()
def weight_penalty(model: nn.Module, weight_decay: float) -> float:
    """``weight_decay / 2`` times the sum of squares of all weights and biases."""
    squares = [parameter.double().square().sum() for parameter in model.parameters()]
    return 0.5 * weight_decay * float(torch.stack(squares).sum())


def counters(optimizer: Any) -> dict[str, float]:
    """What ``optimizer.diagnostics()`` counts, added up over the layers, and its own counters.

    Empty for optimizers without diagnostics. Reads from the device, so not for timed code.
    """
    if not hasattr(optimizer, "diagnostics"):
        return {}
    entries = list(optimizer.diagnostics().values())
    if hasattr(optimizer, "counters"):
        entries.append(optimizer.counters())
    found: dict[str, float] = {}
    for entry in entries:
        for name, value in entry.items():
            found[name] = found.get(name, 0) + float(value)
    return found


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch sees no CUDA device")
    return device
