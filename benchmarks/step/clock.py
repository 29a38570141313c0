"""Seconds of a step by phase: K-BFGS says where it is, others are wrapped.

On a GPU a reading is a CUDA event: nothing waits inside a step.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.baselines.kfac import KFAC
from kbfgs_ext import KBFGS

PHASES = ("first pass", "second pass", "statistics", "direction", "curvature", "other")
OTHER = PHASES[-1]


class PhaseClock:
    """Divides a step among its phases: all time belongs to the innermost one, or to "other"."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []  # what begins when

    def seconds(self, step: Callable[[], object]) -> dict[str, float]:
        """Take a step; its seconds by phase, of those it has gone through. They sum to the step."""
        self._marks.clear()
        self._wait()
        self._mark(OTHER)
        step()
        self._mark(OTHER)
        self._wait()
        found: dict[str, float] = {}
        for (phase, start), (_, end) in itertools.pairwise(self._marks):
            found[phase] = found.get(phase, 0.0) + self._between(start, end)
        return found

    def timed(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """``call``, whose time is that of ``phase``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._phase(phase):
                return call(*args, **kwargs)

        return timed

    def watch(self, opt: object) -> None:
        """Time the methods of ``opt`` that are a phase."""
        if isinstance(opt, KBFGS):
            opt.steps.phase = self._phase
        elif isinstance(opt, KFAC):
            self._watch(opt, "sampled_gradients", "second pass")
            self._watch(opt, "gather", "statistics")
            for layer in opt.layers:
                self._watch(layer, "invert", "curvature")
                self._watch(layer, "descend", "direction")

    def _watch(self, owner: object, name: str, phase: str) -> None:
        setattr(owner, name, self.timed(getattr(owner, name), phase))

    @contextlib.contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        outer, _ = self._marks[-1]
        self._mark(phase)
        try:
            yield
        finally:
            self._mark(outer)

    def _mark(self, phase: str) -> None:
        if self._device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((phase, now))

    def _between(self, start: Any, end: Any) -> float:
        on_gpu = self._device.type == "cuda"
        return start.elapsed_time(end) * 1e-3 if on_gpu else end - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
