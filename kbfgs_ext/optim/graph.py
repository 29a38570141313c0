"""A whole training step as one CUDA graph: both passes, the update, the safeguard's judgement.

A step of a small network is some hundred launches of a few microseconds each; replayed as a graph
they are one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kbfgs_ext.optim import hyper
from kbfgs_ext.optim.kbfgs import KBFGS

WARM_UP = (
    3  # the first step looks at a flag; cuBLAS, autotuning and allocators settle in the others
)
# Hyperparameters that are numbers in the kernels' launches; lr and the dampings are read from
# scalars on the device.
BAKED = ("momentum", "stat_decay", "pair_decay", "powell", "weight_decay")


class Graph:
    """What ``run`` does on the device, captured; ``result`` is the tensor it returns.

    Args:
        run: called once, on ``stream``.
        stream: of the device, used for nothing else. Left to itself torch takes one stream for
            all captures of a process, on the device of the first.
    """

    def __init__(self, run: Callable[[], torch.Tensor], stream: torch.cuda.Stream) -> None:
        torch.cuda.synchronize(stream.device)
        self._graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(stream.device),
            # Other threads may go on to allocate, such as one that pins a loader's batches.
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self.result = run()

    def replay(self) -> None:
        """Do it, with what is in the captured tensors now."""
        self._graph.replay()


class CapturedStep:
    """A training step for static shapes, captured as a CUDA graph and replayed.

        step = CapturedStep(opt, lambda x, y: loss_fn(model(x), y))
        for x, y in loader:
            loss = step(x, y)

    The first ``warm_up`` calls are ordinary steps, on a stream of their own; then one is captured,
    and with pair_every or update_every above 1 one of every kind, each when it comes next.
    From there on a call copies its inputs to the graph's and replays it, with the same results.
    lr, damping, damping_a and damping_g of the optimizer's groups may change between calls, by a
    scheduler or by hand. On a CPU every call is an ordinary step.

    Args:
        optimizer: the `KBFGS` or `KBFGSL` to step.
        loss_function: called with the inputs, returns the loss; the forward alone.
        warm_up: ordinary steps before the capture, at least 2.

    Raises:
        TypeError: ``optimizer`` is no `KBFGS`, or ``loss_function`` cannot be called.
        ValueError: ``warm_up`` is below 2.
        NotImplementedError: the optimizer has a process group of several.
    """

    def __init__(
        self,
        optimizer: KBFGS,
        loss_function: Callable[..., torch.Tensor],
        *,
        warm_up: int = WARM_UP,
    ) -> None:
        if not isinstance(optimizer, KBFGS):
            raise TypeError(f"optimizer must be a KBFGS or KBFGSL, got {type(optimizer).__name__}")
        if not callable(loss_function):
            raise TypeError(f"loss_function must be a function, got {loss_function!r}")
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 2:
            raise ValueError(f"warm_up must be an int of at least 2, got {warm_up!r}")
        if not optimizer.steps.process.alone:
            raise NotImplementedError(
                "CapturedStep captures the step of one process, and this optimizer is one of"
                f" {optimizer.steps.process.size}: call optimizer.step(closure)"
            )
        self._optimizer, self._loss_function, self._warm_up = optimizer, loss_function, warm_up
        self._calls = 0
        self._stream: Any = None  # of warm-up and capture
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._graphs: dict[tuple[bool, bool], Graph] = {}  # by `Step.kind`
        self._warm: set[tuple[bool, bool]] = set()  # the kinds that an ordinary step has shown
        self._baked: list[dict[str, Any]] = []
        # What a replay writes and the optimizer might let go of: an ordinary step between replays
        # makes other copies when other parameters have gradients.
        self._held: list[torch.Tensor] = []

    @property
    def captured(self) -> bool:
        """Whether steps are replays by now."""
        return bool(self._graphs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """One training step on a minibatch; the arguments go to the loss function.

        Returns:
            The loss of the first pass, detached. A replay writes it to the same place as the last
            one: clone it to keep it.

        Raises:
            TypeError: an input is no tensor.
            ValueError: an input's shape, dtype or device is not as captured.
            RuntimeError: the step cannot be captured, or cannot follow a change by a replay; the
                message says why and what to do.
        """
        self._check_inputs(inputs)
        self._calls += 1
        if self._optimizer.device.type != "cuda":
            return self._ordinary(inputs)
        kind = self._optimizer.steps.kind
        if kind not in self._graphs:
            started = all(layer.started for layer in self._optimizer.layers)
            if self._calls <= self._warm_up or not started or kind not in self._warm:
                self._warm.add(kind)
                return self._on_the_side(inputs)
            self._capture(inputs, kind)
        return self._replay(inputs, self._graphs[kind])

    def _closure(self, inputs: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            self._optimizer.zero_grad()
            loss = self._loss_function(*inputs)
            loss.backward()
            return loss

        return closure

    def _ordinary(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._optimizer.step(self._closure(inputs)).detach()

    def _on_the_side(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """An ordinary step on another stream, as captures want it, watched for random numbers."""
        device = self._optimizer.device
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device)
        if self._stream is None:  # memory and workspaces of a stream are its own
            self._stream = torch.cuda.Stream(device)
        stream, here = self._stream, torch.cuda.current_stream(device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            loss = self._ordinary(inputs)
        here.wait_stream(stream)
        after = torch.get_rng_state(), torch.cuda.get_rng_state(device)
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            raise RuntimeError(
                "this step cannot be captured: it draws random numbers (dropout?), and a replay"
                " cannot give both passes the same new ones. Use optimizer.step(closure)"
            )
        return loss

    def _capture(self, inputs: tuple[torch.Tensor, ...], kind: tuple[bool, bool]) -> None:
        self._refuse()
        if not self._graphs:
            self._inputs = tuple(t.clone() for t in inputs)
            self._baked = self._present()
        self._check_baked()
        closure = self._closure(self._inputs)
        with self._optimizer.steps.captured():
            self._graphs[kind] = Graph(
                lambda: self._optimizer.step_once(closure).detach(), self._stream
            )
        self._held += self._optimizer.steps.copies()

    def _check_baked(self) -> None:
        if self._present() != self._baked:
            raise RuntimeError(
                f"{', '.join(BAKED)} and the fallback's settings are part of the captured step and"
                " have changed since, or a checkpoint was loaded, or restart() called; make a new"
                " CapturedStep (a fallback whose lr is a tensor on the device may change it)"
            )

    def _replay(self, inputs: tuple[torch.Tensor, ...], graph: Graph) -> torch.Tensor:
        self._check_baked()
        with self._optimizer.replayed_step():
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given, non_blocking=True)
            graph.replay()
        return graph.result

    def _check_inputs(self, inputs: tuple[torch.Tensor, ...]) -> None:
        for i, given in enumerate(inputs):
            if not isinstance(given, torch.Tensor):
                raise TypeError(f"input {i} must be a tensor, got {type(given).__name__}")
        if not self.captured:
            return
        wanted = [(t.shape, t.dtype, t.device) for t in self._inputs]
        got = [(t.shape, t.dtype, t.device) for t in inputs]
        if wanted != got:
            raise ValueError(
                f"the inputs must be as captured, {wanted}, got {got}; leave out a smaller last"
                " batch (drop_last=True)"
            )

    def _refuse(self) -> None:
        """Raise RuntimeError for what a graph cannot hold."""
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            if not group.get("capturable", True):
                raise RuntimeError(
                    "this step cannot be captured: the fallback keeps its step count on the host;"
                    " make it with capturable=True"
                )
            if any(_on_host(group.get(name)) for name in ("lr", *hyper.DAMPINGS)):
                raise RuntimeError(
                    "this step cannot be captured: lr or damping is a tensor on the CPU; put it on"
                    " the device, or use a number"
                )

    def _present(self) -> list[dict[str, Any]]:
        """The values that a graph keeps as they are."""
        steps = self._optimizer.steps
        covered = len(steps.parts.groups)
        present: list[dict[str, Any]] = [{"version": steps.version}]
        for i, group in enumerate(self._optimizer.param_groups):
            names = BAKED if i < covered else [name for name in group if name != "params"]
            values = {name: group[name] for name in names}
            present.append({k: v for k, v in values.items() if not isinstance(v, torch.Tensor)})
        return present


def _on_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"
