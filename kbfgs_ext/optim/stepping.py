"""One step as four calls, for loops that own forward and backward.

    first_pass    the minibatch at the present weights
    descend       statistics, direction, weights
    second_pass   the same minibatch at the new weights
    finish        the safeguard's judgement, the pair, the curvature

`KBFGS.step(closure)` is these four in a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from kbfgs_ext.ops import registry
from kbfgs_ext.optim import gradients, hyper
from kbfgs_ext.optim.base import CoveredOptimizer
from kbfgs_ext.optim.capture import Pass
from kbfgs_ext.optim.factors import LayerFactors
from kbfgs_ext.optim.method import KBFGSMethod
from kbfgs_ext.optim.passes import RandomState, SecondPass, own_work
from kbfgs_ext.optim.restart import Orders

Closure = Callable[[], torch.Tensor]
FIRST, DESCEND, SECOND, FINISH = "first_pass()", "descend(loss)", "second_pass()", "finish(loss)"


@dataclasses.dataclass
class Flight:
    """A step between its first pass and its end."""

    random: RandomState
    next: str = DESCEND  # the call that comes next
    active: list[LayerFactors] = dataclasses.field(default_factory=list)
    paired: list[LayerFactors] = dataclasses.field(default_factory=list)  # they yield a pair
    value: torch.Tensor | None = None  # the loss of the first pass
    ok: torch.Tensor | None = None  # false: the step is void
    slope: torch.Tensor | None = None  # derivative of the loss along the step, if it is wanted
    unscale: torch.Tensor | None = None  # 1/scale of the loss, if it was scaled
    late: bool = False  # step 9 is still to be done, with steps 6 to 8


class SteppingOptimizer(CoveredOptimizer):
    """The four calls of a step."""

    _method: KBFGSMethod
    safeguard: bool
    freeze_second_pass: bool
    max_grad_norm: float | None
    matmul_precision: str | None
    pair_every: int
    factor_every: int
    _flight: Flight | None = None
    _capturing = False  # a graph must not write the lr and dampings of its capture

    # ------------------------------------------------------------------ the calls

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Context: zero the gradients, run the model on a minibatch, call ``backward()``.

        A step that was not carried to its end before stays as it is, without a pair.

        Raises:
            RuntimeError: under ``torch.inference_mode()``, or inside a pass.
            ValueError: a hyperparameter is out of its range, or a layer's input is empty.
        """
        self._begin()
        try:
            with self._recording(Pass.FIRST):
                yield
        except BaseException:
            self._flight = None
            raise

    def descend(self, loss: torch.Tensor, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Take the step, with the factors as they stand.

        Args:
            loss: of the first pass, whole and unscaled; with micro-batches, their sum.
            scaler: whose ``scale(loss)`` went backward, if it did.

        Raises:
            TypeError: ``loss`` is no real scalar.
            RuntimeError: out of order, or no gradient has reached a covered layer.
        """
        self._run_pre_hooks()
        self._descend(loss, scaler)
        if not self.second_pass_due:
            self._run_post_hooks()

    @property
    def second_pass_due(self) -> bool:
        """Whether the step under way wants a second pass: all do, unless ``pair_every`` > 1."""
        return self._flight is not None and self._flight.next in (SECOND, FINISH)

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[None]:
        """Context: the same minibatch again, at the new weights, and ``backward()``.

        Inside, torch's random numbers are those of the first pass and the weights want no
        gradient; afterwards buffers and gradients are as the first pass left them. An exception
        inside takes the step back.

        Raises:
            RuntimeError: out of order, or the step has no second pass (``second_pass_due``).
        """
        flight = self._expect(SECOND)
        try:
            with (
                SecondPass(
                    itertools.chain(self._context.parameters(), self._parameters()),
                    self._anchors(flight),
                    flight.random,
                    self._buffers,
                    self.freeze_second_pass,
                ),
                self._recording(Pass.SECOND),
            ):
                yield
                flight.paired = _settled(flight.paired)
        except BaseException:
            self._flight = None
            if flight.active:
                with self._own_work():
                    self._undo(flight.active, torch.ones_like(self._guard.scale, dtype=torch.bool))
            raise
        flight.next = FINISH

    def finish(self, loss: torch.Tensor) -> None:
        """End the step: the safeguard's judgement, the pair and the curvature.

        Args:
            loss: of the second pass, whole and unscaled.

        Raises:
            TypeError: ``loss`` is no real scalar.
            RuntimeError: out of order.
        """
        self._finish(loss)
        self._run_post_hooks()

    # ------------------------------------------------------------------ what they do

    def _begin(self) -> None:
        if self._recorder.at is not Pass.OFF:
            raise RuntimeError(f"first_pass() inside the {self._recorder.at.value} of a step")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a step needs gradients: it cannot run under inference_mode()")
        if self.closed:
            raise RuntimeError("this optimizer is closed: make a new one to go on training")
        for covered in self._covered:
            hyper.check_group(covered.group)
        self._trace.clear()
        self._materialize()
        self._buffers.watch()
        self._flight = Flight(RandomState(self._guard.scale.device, self._generators))

    def _expect(self, call: str) -> Flight:
        wanted = FIRST if self._flight is None else self._flight.next
        if wanted != call or self._recorder.at is not Pass.OFF:
            raise RuntimeError(f"{call} is out of order: {wanted} comes next")
        assert self._flight is not None
        return self._flight

    def _descend(self, loss: Any, scaler: torch.amp.GradScaler | None) -> None:
        flight = self._expect(DESCEND)
        gradients.check_scaler(scaler)
        with self._own_work():
            value, active = gradients.scalar(loss, self._guard.scale), self._active()
            flight.unscale = gradients.unscale(self, scaler, self._guard.scale.device)
            if flight.unscale is not None:
                torch._foreach_mul_([layer["g_bar"] for layer in active], flight.unscale)
            found = gradients.Gradients(self._with_gradients(active), value)
            ok = found.finite(value)
            clipped = found.clip(self.max_grad_norm)
            started = all(layer.started for layer in active) or gradients.known_true(ok)
            if started and self._fallback is not None:
                self._fallback.step(ok)  # first: it may raise, and then nothing has moved
            self._guard.count(ok)
            flight.value, flight.ok, flight.next = value, ok, SECOND
            if not started:
                return  # nothing to start the factors from yet
            flight.active = active
            flight.paired = [layer for layer in active if layer.observer.complete]
            paired = self._iteration % self.pair_every == 0
            self._iteration += 1
            flight.late = (
                paired
                and self._plan.keep_A
                and all(layer.observer.has_inputs() for layer in active if layer.uses("H_a"))
            )
            early = not flight.late and any(layer.observer.has_inputs() for layer in active)
            orders = Orders(a=self._guard.take_order_a(ok)) if early else Orders()
            for group, layers, scalars in self._split(active):
                if not self._capturing:
                    scalars.refresh(group)
                scalars.set_step_size(self._guard.scale)
                for layer in layers:
                    if not layer.started and not layer.bare:
                        layer.start_g(scalars.lam_g, self._plan)
                seen = [layer for layer in layers if layer.observer.has_inputs()]
                if seen:
                    self._method.statistics(seen, group, scalars, ok)
                self._method.descend(layers, group, scalars, self._scratch(layers), ok)
                if layers[0].halved:
                    for layer in layers:
                        layer.hold()
                if seen and not flight.late:
                    self._method.curvature_from_activations(seen, group, scalars, ok, orders)
            for layer in active:
                layer.observer.forget_inputs()  # the activations need not outlive the first pass
                layer.started = layer.started or not layer.bare
            if not paired:
                self._flight = None
            elif self.safeguard and self._guard.wants_slope:
                flight.slope = self._slope(active)
                if clipped is not None:
                    flight.slope /= clipped  # the loss knows nothing of it

    def _finish(self, loss: Any) -> None:
        flight = self._expect(FINISH)
        with self._own_work():
            value = gradients.scalar(loss, self._guard.scale)
            ok = flight.ok
            assert ok is not None and flight.value is not None
            self._flight = None
            if not flight.active:
                return
            self._method.output_change(flight.paired)  # by the step as it was taken
            if self.safeguard:
                undo = self._guard.judge(
                    flight.value, value, flight.slope, gradients.noise(loss), ok
                )
                self._undo(flight.active, undo)
            ok_pair = ok & gradients.is_finite(value)
            if flight.unscale is not None and flight.paired:
                g_bar_next = [layer["g_bar_next"] for layer in flight.paired]
                torch._foreach_mul_(g_bar_next, flight.unscale)
                ok_pair &= gradients.all_finite(g_bar_next)
            order_a = self._guard.take_order_a(ok) if flight.late else None
            orders = Orders(order_a, self._guard.order_g)
            for group, layers, scalars in self._split(flight.paired):
                self._method.curvature(layers, flight.late, group, scalars, ok, ok_pair, orders)

    # ------------------------------------------------------------------ around a replayed step

    def _begin_replay(self) -> None:
        """What a step does on the host before its kernels."""
        self._run_pre_hooks()
        for covered in self._covered:
            hyper.check_group(covered.group)
            with torch.no_grad():
                covered.scalars.refresh(covered.group)

    def _end_replay(self) -> None:
        """What a step does on the host after its kernels."""
        self._iteration += 1
        self._run_post_hooks()

    # ------------------------------------------------------------------ small things

    @contextlib.contextmanager
    def _own_work(self) -> Iterator[None]:
        with own_work(self._guard.scale.device, self.matmul_precision), registry.watch(self._trace):
            yield

    @contextlib.contextmanager
    def _recording(self, which: Pass) -> Iterator[None]:
        """The hooks in the given state."""
        suffix = "_next" if which is Pass.SECOND else ""
        fresh = self._iteration % self.factor_every == 0
        paired = which is Pass.SECOND or self._iteration % self.pair_every == 0
        for layer in self._layers():
            wanted = layer.has("H_a") and (fresh or not layer.started)
            keep_inputs = which is not Pass.SECOND and wanted
            a_bar = layer["a_bar" + suffix] if paired else None
            layer.observer.begin(a_bar, layer["g_bar" + suffix], keep_inputs)
            if which is Pass.FIRST:
                layer.observer.expect_fresh_gradients()
        self._recorder.begin(which)
        try:
            with torch.set_grad_enabled(which is not Pass.WARM):
                yield
        except RuntimeError as error:
            if self._in_the_dark():
                raise RuntimeError(_DARK) from error
            raise
        finally:
            self._recorder.at = Pass.OFF

    def _in_the_dark(self) -> bool:
        """Whether the pass has run covered layers, but none with gradients."""
        return self._recorder.in_the_dark and not any(
            layer.observer.uses for layer in self._layers()
        )

    def _active(self) -> list[LayerFactors]:
        """The layers that this step moves: a gradient has reached them."""
        active, empty = [], []
        for layer in self._layers():
            observer = layer.observer
            if observer.dark and observer.recomputed and not observer.uses:
                raise RuntimeError(
                    f"layer '{layer.name}' ran forward without gradients and was recomputed in"
                    " backward: use torch.utils.checkpoint with use_reentrant=False"
                )
            if observer.empty and not observer.uses:
                empty.append(layer)  # its gradients are zero: no use at all
                continue
            layer.look()
            if layer.moving:
                active.append(layer)
        if not active and empty:
            raise ValueError(
                f"the input of layer '{empty[0].name}' is empty: shape {empty[0].observer.empty};"
                " a step needs a batch with at least one row"
            )
        if not active:
            names = ", ".join(layer.name for layer in self._layers())
            raise RuntimeError(
                _DARK
                if self._in_the_dark()
                else "closure must call backward() on a loss that depends on the covered layers,"
                f" and leave their gradients in place: no gradient has reached any of {names}"
            )
        self._warn_once(active)
        return active

    def _with_gradients(self, active: list[LayerFactors]) -> list[torch.Tensor]:
        parameters: list[torch.Tensor] = [p for layer in active for p in layer.moving]
        return parameters + (self._fallback.parameters() if self._fallback is not None else [])

    def _anchors(self, flight: Flight) -> list[torch.Tensor]:
        """Where the graph of a second pass starts: every layer's bias, real or virtual, and in its
        place what moves of a layer whose call was not seen, which may be all that the loss has."""
        anchors = [layer.observer.anchor() for layer in self._layers()]
        unseen = [layer for layer in flight.active if not layer.observer.seen]
        return anchors + [p for layer in unseen for p in layer.moving]

    def _slope(self, active: list[LayerFactors]) -> torch.Tensor:
        """The derivative of the loss along the step just taken, a scalar on the device."""
        if len(active) < len(self._layers()):
            self._slopes.zero_()
        self._method.slope(active)
        slope = self._slopes.sum(dtype=self._guard.scale.dtype)
        return slope if self._fallback is None else slope + self._fallback.slope(slope)

    def _undo(self, active: list[LayerFactors], undo: torch.Tensor) -> None:
        """Put every parameter back where ``undo``."""
        self._method.undo(active, undo)
        if self._fallback is not None:
            self._fallback.undo(undo)

    def _run_pre_hooks(self) -> None:
        self._opt_called = True  # what torch's schedulers look for
        for hook in itertools.chain(
            _global_optimizer_pre_hooks.values(), self._optimizer_step_pre_hooks.values()
        ):
            hook(self, (self,), {})

    def _run_post_hooks(self) -> None:
        for hook in itertools.chain(
            self._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values()
        ):
            hook(self, (self,), {})


_DARK = (
    "the covered layers ran under torch.no_grad() or inference_mode(): a pass needs gradients,"
    " so run the model with them enabled"
)


def _settled(layers: list[LayerFactors]) -> list[LayerFactors]:
    """After the second pass: the layers whose input and bias gradient it has shown again."""
    for layer in layers:
        layer.observer.settle()
    return [layer for layer in layers if layer.observer.complete]
