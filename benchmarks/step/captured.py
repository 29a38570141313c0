"""Steps as CUDA graphs: ours by `CapturedStep`, ordinary optimizers' by the same graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kbfgs_ext import KBFGS, CapturedStep
from kbfgs_ext.optim import graph

LossOf = Callable[[Tensor], Tensor]  # the forward alone
BEFORE_REPLAYS = graph.WARM_UP + 1  # calls: ordinary steps, and the one that captures


def captured(opt: torch.optim.Optimizer, loss_of: LossOf) -> Callable[[Tensor], Tensor]:
    """A step of ``opt`` on a batch that becomes a graph after `graph.WARM_UP` calls."""
    return CapturedStep(opt, loss_of) if isinstance(opt, KBFGS) else OrdinaryCapture(opt, loss_of)


class OrdinaryCapture:
    """The step of one of torch's optimizers, captured as `CapturedStep` captures ours.

    A replay copies its inputs to the graph's first, as training on new batches must.
    """

    def __init__(self, opt: torch.optim.Optimizer, loss_of: LossOf) -> None:
        self._opt, self._loss_of = opt, loss_of
        self._x = torch.empty(0)  # the graph's
        self._calls = 0
        self._graph: graph.Graph | None = None
        self._stream: Any = None  # made by the first step

    def __call__(self, x: Tensor) -> Tensor:
        self._calls += 1
        if self._calls <= graph.WARM_UP:
            self._x = x
            return self._on_the_side()
        if self._graph is None:
            self._x = x.clone()
            self._graph = graph.Graph(self._step, self._stream)
        self._x.copy_(x, non_blocking=True)
        self._graph.replay()
        return self._graph.result

    def _step(self) -> Tensor:
        # Gradients are dropped inside the graph, so that backward makes them in its own memory.
        self._opt.zero_grad(set_to_none=True)
        loss = self._loss_of(self._x)
        loss.backward()
        self._opt.step()
        return loss.detach()

    def _on_the_side(self) -> Tensor:
        """An ordinary step on another stream, as captures want it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._x.device)
        stream, here = self._stream, torch.cuda.current_stream(self._x.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            loss = self._step()
        here.wait_stream(stream)
        return loss
