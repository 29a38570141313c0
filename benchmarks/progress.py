"""Live display of a run in the terminal: a bar with loss and time left, a line per epoch."""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from benchmarks.records import Row, Run
from benchmarks.training import Observer

# The display's thread shares the cores with training: no more often than the loss is read.
REFRESH = 2.0  # per second


def describe(run: Run) -> str:
    """One line: optimizer with its main settings, dataset, seed and device."""
    shown = ("lr", "damping", "damping_a", "damping_g", "momentum", "hessian_action", "memory")
    settings = ", ".join(f"{name} {run.settings[name]}" for name in shown if name in run.settings)
    environment = run.environment
    return (
        f"[bold]{run.config.optimizer}[/] ({settings}) on {run.dataset['label']}, "
        f"batch {run.config.batch_size:,}, seed {run.config.seed}, {environment['device']}"
        + (f", {environment['threads']} threads" if environment["device_type"] == "cpu" else "")
    )


class Display(Observer):
    """Prints a run as it happens; ``every`` thins out the lines of long runs."""

    def __init__(self, console: Console, every: int = 1) -> None:
        self.console = console
        self.every = every
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.steps_per_epoch = 1
        self.by_time = False
        self.last: Row | None = None  # the newest row, if it was not printed

    def started(self, run: Run, steps_per_epoch: int) -> None:
        """Print the headings and start the bar, over seconds if these limit the run."""
        self.console.print(describe(run), highlight=False, soft_wrap=True)
        self.console.print(f"{'epoch':>5} {'steps':>7} {'train':>10} {'test':>10} {'seconds':>9}")
        self.steps_per_epoch = steps_per_epoch
        self.by_time = run.config.max_seconds is not None
        total = run.config.max_seconds or run.config.epochs * steps_per_epoch
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.2f}, left"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=REFRESH,
            transient=True,
        )
        self.task = self.progress.add_task(run.config.optimizer, total=total, loss=math.nan)
        self.progress.start()

    def stepped(self, steps: int, seconds: float, loss: float) -> None:
        """Move the bar."""
        self._move(steps, seconds, loss)

    def evaluated(self, row: Row) -> None:
        """Print the row of every ``every``-th epoch and move the bar."""
        self._move(row.steps, row.seconds, row.train_loss)
        self.last = row
        if row.epoch % self.every == 0:
            self._print(row)

    def ended(self, run: Run) -> None:
        """Remove the bar, print the last row and anything but a complete end."""
        if self.progress is not None:
            self.progress.stop()
        if self.last is not None:
            self._print(self.last)
        if run.status != "complete":
            epochs = max(len(run.rows) - 1, 0)
            self.console.print(f"[bold red]{run.status}[/] after {epochs} epochs")

    def _move(self, steps: int, seconds: float, loss: float) -> None:
        if self.progress is not None:
            done = seconds if self.by_time else steps
            self.progress.update(self.task, completed=done, loss=loss)

    def _print(self, row: Row) -> None:
        self.last = None
        self.console.print(
            f"{row.epoch:>5g} {row.steps:>7,} {row.train_loss:>10.3f} {row.test_loss:>10.3f} "
            f"{row.seconds:>9.2f}",
            highlight=False,
        )
