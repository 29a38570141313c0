"""A step: two passes over a minibatch, and what is done between and after them.

    first_pass    the minibatch at the present weights
    descend       statistics, direction, weights
    second_pass   the same minibatch at the new weights
    finish        the safeguard's judgement, the pair, the curvature

`Step` waits between these four calls; what it does stands in `Step._phases`, from top to bottom.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kbfgs_ext.ops import registry
from kbfgs_ext.optim import averages, direction, gradients, hyper, scales, shown
from kbfgs_ext.optim.capture import Pass
from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.fallback import Fallback
from kbfgs_ext.optim.moved import Moved
from kbfgs_ext.optim.parts import Group, Parts, of_mine
from kbfgs_ext.optim.passes import (
    Buffers,
    RandomState,
    SecondPass,
    once,
    own_work,
    parameters_of,
    profiled,
)
from kbfgs_ext.optim.process import Alone
from kbfgs_ext.optim.recorder import Recorder
from kbfgs_ext.optim.reports import Watch
from kbfgs_ext.optim.safeguard import Safeguard
from kbfgs_ext.optim.settings import Settings
from kbfgs_ext.optim.updates import Verdict

FAILED = object()  # what a pass that raised sends
FIRST, DESCEND, SECOND, FINISH = "first_pass()", "descend(loss)", "second_pass()", "finish(loss)"


class Step:
    """One step after the other: the layers, the safeguard, and where the present step stands.

    Args:
        settings: of the whole optimizer.
        model: whatever the closure runs: buffers and gradients there see one pass.
        generators: that the closure draws from.
        device: of the covered layers.
        process: one of several that train the model together, or alone.
    """

    def __init__(
        self,
        settings: Settings,
        model: nn.Module,
        generators: Sequence[torch.Generator],
        device: torch.device,
        process: Alone,
    ) -> None:
        self.settings, self.generators = settings, generators
        self.device, self.process = device, process
        self.guard = Safeguard(settings.rule, device, settings.restart_after, settings.backend)
        self.direction = direction.Direction(settings, process.shares)
        self.fallback: Fallback | None = None
        self.recorder = Recorder(process)
        self.buffers = Buffers(model)
        self.number = 0  # steps that have moved the parameters, void ones too
        self.version = 0  # checkpoints loaded, groups added, restarts: a captured step is void
        self.capturing = False  # a graph must not write the lr and dampings of its capture
        self.trace: dict[str, registry.Taken] = {}  # which backend each op of the last step took
        self.phase: Callable[[str], contextlib.AbstractContextManager[Any]] = profiled
        self.due = FIRST  # the call that comes next
        self.active: list[CoveredLayer] = []  # the layers that the step under way moves
        self.slope: torch.Tensor | None = None  # of the loss along it, where it is wanted
        self._paired: list[CoveredLayer] = []  # those that yield a pair
        self._moved = Moved()  # by the step under way
        self._random: RandomState | None = None
        self._model, self._watch = model, Watch(model)
        self.parts = Parts(settings, device, process.piece)
        self._course: Generator[str, Any, None] | None = None

    # ------------------------------------------------------------------ the calls

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Context of the first pass; `KBFGS.first_pass`."""
        self._begin()
        try:
            with self.phase(Pass.FIRST.value), self.recording(Pass.FIRST):
                yield
        except BaseException as error:
            self.abandon()
            self.process.fail(error, inside=True)
            raise

    def descend(self, loss: Any, unscale: Callable[[], torch.Tensor | None]) -> None:
        """Take the step; `KBFGS.descend`. ``unscale`` divides the gradients by the scale of the
        loss, and returns what it has multiplied by, or None."""
        self.expect(DESCEND)
        self._advance((self._scalar(loss), unscale))

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[None]:
        """Context of the second pass; `KBFGS.second_pass`."""
        self.expect(SECOND)
        assert self._random is not None
        everything = itertools.chain(parameters_of(self._model), self.parameters())
        anchors, freeze = self._anchors(), self.settings.freeze_second_pass
        try:
            with (
                self.phase(Pass.SECOND.value),
                self.process.quiet(),
                SecondPass(everything, anchors, self._random, self.buffers, freeze),
                self.recording(Pass.SECOND),
            ):
                yield
                for layer in self._paired:
                    layer.observer.settle()
        except BaseException as error:
            self._advance(FAILED)
            self.process.fail(error)
            raise
        self._advance(None)

    def finish(self, loss: Any) -> None:
        """End the step; `KBFGS.finish`."""
        self.expect(FINISH)
        self._advance((self._scalar(loss), gradients.noise(loss)))

    def _scalar(self, loss: Any) -> torch.Tensor:
        try:
            return gradients.scalar(loss, self.guard.scale)
        except TypeError as error:
            self._advance(FAILED)
            self.process.fail(error)
            raise

    def abandon(self) -> None:
        """The step under way, if there is one, ends where it stands."""
        if self._course is not None:
            self._course.close()
        self._course, self.due, self.active, self._paired = None, FIRST, [], []

    @property
    def kind(self) -> tuple[bool, bool]:
        """Of the next step: whether it has a second pass, and whether it needs activations."""
        settings = self.settings
        return self.number % settings.pair_every == 0, self.number % settings.factor_every == 0

    @property
    def second_pass_wanted(self) -> bool:
        """Whether the second pass has anything to show: not where factors could not start."""
        return self.due == SECOND and bool(self.active)

    # ------------------------------------------------------------------ what they do

    def _phases(self) -> Generator[str, Any, None]:
        """A step from the end of its first pass on. It stops where a call is due."""
        settings, process, guard, fallback = self.settings, self.process, self.guard, self.fallback
        self._moved = moved = Moved(self.number)
        if (given := (yield DESCEND)) is FAILED:
            return
        loss, unscale = given
        with self.own_work():
            shown.look(self.layers)
            loss = process.first(loss)
            active = shown.moved(self.recorder, self.layers)
            self._watch.look(active, self.parameters())
            unscaled = unscale()
            if unscaled is not None:
                torch._foreach_mul_([layer["g_bar"] for layer in active], unscaled)
            moving: list[torch.Tensor] = [p for layer in active for p in layer.moving]
            found = gradients.Gradients(self.parameters(moving), loss, process, unscaled)
            seen = any(layer.observer.has_inputs() for layer in active)
            # Step 9 waits for steps 6 to 8, if it does not need the activations by then.
            late = self.kind[0] and settings.keep_A and all(x.has_shown_inputs for x in active)
            judged_first = late and guard.rule is not None
            ok = moved.ok = guard.admit(loss, found.norms, seen and not judged_first)
            clipped = found.clip(settings.max_grad_norm)
            started = all(layer.started for layer in active) or gradients.known_true(ok)
            if started and fallback is not None:
                fallback.step(ok)  # first: of all parts of a step it is most likely to raise
                moved.fallback = fallback
            # If not, there is nothing to start the factors from yet.
            active = self.active = active if started else []
            self._paired = [layer for layer in active if layer.observer.complete]
            paired = not active or self.kind[0]
            self.number += bool(active)
            moved.fresh = [x for x in active if not x.started and not x.bare]
            order_a = guard.order_a if seen else None
            self._descend(active, Verdict(ok, ok, order_a), late)
            if paired and active and guard.wants_slope:
                self.slope = self._slope(active)
                if clipped is not None:
                    self.slope /= clipped  # the loss knows nothing of it
            if not paired:
                process.followed(Verdict(ok, ok, order_a))
                return

        if (given := (yield SECOND) or (yield FINISH)) is FAILED:
            self._take_back()
            return
        if not active:
            return
        loss_next, noise = given
        with self.own_work():
            loss_next, slope = process.second(self._paired, loss_next, self.slope)
            pairs = [layer for layer in self._paired if layer.observer.complete]
            parts = moved.parts if len(pairs) == len(active) else self.parts.of(pairs)
            for part in parts:
                direction.output_change(part)  # by the step as it was taken
            process.changed(parts)
            if guard.rule is not None:
                moved.undo(guard.judge(loss, loss_next, slope, noise, ok, late))
            ok_pair = guard.sound_pair if guard.rule else ok & gradients.is_finite(loss_next)
            if unscaled is not None and pairs:
                g_bar_next = [layer["g_bar_next"] for layer in pairs]
                torch._foreach_mul_(g_bar_next, unscaled)
                ok_pair = ok_pair & gradients.all_finite(g_bar_next)
            verdict = Verdict(ok, ok_pair, order_a, guard.order_g)
            with self.phase("curvature"):
                for part in of_mine(parts):
                    scales.measure_pairs(part, ok_pair)
                    part.gradient.update(part, verdict, late and process.alone)
                process.followed(verdict)

    def _descend(self, active: list[CoveredLayer], verdict: Verdict, late: bool) -> None:
        """Steps 2 to 4, and step 9 unless it comes ``late``."""
        process, parts, seen = self.process, self.parts.of(active), []
        for part in parts:
            scalars, layers = part.scalars, part.layers
            if not self.capturing:
                scalars.refresh(part.group)
            scalars.set_step_size(self.guard.scale)
            for layer in layers:
                for factor in () if layer.started or layer.bare else layer.gradients:
                    factor.start(scalars.lam_g)
            fresh = [layer for layer in layers if layer.observer.has_inputs()]
            with self.phase("statistics"):
                for one in self.parts.of(fresh, by_inputs=True):
                    averages.follow(one, self.parts, process, verdict.ok)
                    seen.append(one)
            self._moved.begin(part)
        with self.phase("direction"):
            process.collect(parts)
            for part in parts:
                for mine in of_mine([part]):
                    self.direction.aim(mine, self.parts.scratch(mine), verdict.ok)
                process.hand_out(part)
            process.handed_out(parts)
            for part in parts:
                self.direction.move(part, verdict.ok)
        with self.phase("curvature"):
            process.follow(seen, verdict, late)
        for layer in active:
            layer.observer.forget_inputs()  # the activations need not outlive the first pass
            layer.started = layer.started or not layer.bare

    def _slope(self, active: list[CoveredLayer]) -> torch.Tensor:
        """The derivative of the loss along the step just taken, a scalar on the device."""
        if len(active) < len(self.layers):
            self.parts.slopes.zero_()
        for part in self._moved.parts:
            direction.slope(part)
        total = self.parts.slopes.sum(dtype=self.guard.scale.dtype)
        return total if self.fallback is None else total + self.fallback.slope(total)

    def _take_back(self) -> None:
        """Undo the step under way: it has failed."""
        moved, self._moved = self._moved, Moved(self._moved.number)
        self.number = moved.number
        for layer in self.layers:
            layer.observer.forget_inputs()
        if not self.capturing:  # where nothing has run
            with self.own_work():
                moved.take_back(self.guard)

    # ------------------------------------------------------------------ passes

    def expect(self, call: str) -> None:
        """``call`` comes next; else RuntimeError."""
        if self.due != call or self.recorder.at is not Pass.OFF:
            raise RuntimeError(f"{call} is out of order: {self.due} comes next")

    def _begin(self) -> None:
        if self.recorder.at is not Pass.OFF:
            raise RuntimeError(f"first_pass() inside the {self.recorder.at.value} of a step")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a step needs gradients: it cannot run under inference_mode()")
        if self.recorder.closed:
            raise RuntimeError("this optimizer is closed: make a new one to go on training")
        for group in self.parts.groups:
            hyper.check_group(group.options)
        self.abandon()
        self.slope = None
        self.trace.clear()
        self.parts.materialize()
        self.process.begin(self.layers, self.parameters(), self.number)
        self.buffers.watch()
        self._random = RandomState(self.device, self.generators)
        self._course = self._phases()
        self.due = next(self._course)

    def _advance(self, given: Any) -> None:
        """Go on to where the next call is due."""
        assert self._course is not None
        try:
            self.due = self._course.send(given)
        except StopIteration:
            self.abandon()
        except BaseException as error:
            try:
                self._take_back()
            finally:
                self.abandon()
            self.process.fail(error)
            raise

    @contextlib.contextmanager
    def recording(self, which: Pass) -> Iterator[None]:
        """The hooks in the given state."""
        suffix = "_next" if which is Pass.SECOND else ""
        paired, fresh = self.kind
        paired = paired or which is Pass.SECOND
        for layer in self.layers:
            keep_inputs = which is not Pass.SECOND and (fresh or not layer.started)
            a_bar = layer["a_bar" + suffix] if paired else None
            layer.observer.begin(a_bar, layer["g_bar" + suffix], keep_inputs)
            if which is Pass.FIRST:
                layer.observer.expect_fresh_gradients()
        self.recorder.begin(which)
        try:
            with torch.set_grad_enabled(which is not Pass.WARM):
                yield
        except RuntimeError as error:
            if shown.in_the_dark(self.recorder, self.layers):
                raise RuntimeError(shown.DARK) from error
            raise
        finally:
            self.recorder.at = Pass.OFF

    def _anchors(self) -> list[torch.Tensor]:
        """Where the graph of a second pass starts: every layer's bias, real or virtual, and in its
        place what moves of a layer whose call was not seen, which may be all that the loss has."""
        biases = [] if self.process.marks_use else self.layers
        anchors = [layer.observer.anchor() for layer in biases]
        unseen = [layer for layer in self.active if not layer.observer.seen]
        return anchors + [p for layer in unseen for p in layer.moving]

    # ------------------------------------------------------------------ small things

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """Context of a step that is captured in a graph: nothing runs."""
        number, self.capturing = self.number, True
        try:
            yield
        finally:
            self.number, self.capturing = number, False

    def add(self, group: Group) -> None:
        """Take in one more group of layers."""
        self.parts.add(group)
        for layer in group.layers:
            self.recorder.attach(layer.uses, layer.observer)

    def restart(self) -> None:
        """Start factors, pairs and momentum anew; `KBFGS.restart`."""
        if self.due != FIRST:
            raise RuntimeError(f"restart() is out of order: {self.due} comes next")
        for layer in self.layers:
            layer.reset()
        self.guard.reset()
        self.version += 1

    @property
    def layers(self) -> list[CoveredLayer]:
        """All covered layers."""
        return self.parts.layers

    def parameters(self, covered: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """All that a step may move; or of the layers those that are given. Each of them once."""
        if covered is None:
            covered = [p for layer in self.layers for p in layer.parameters()]
        return once(covered) + (self.fallback.parameters() if self.fallback is not None else [])

    def copies(self) -> list[torch.Tensor]:
        """What a step keeps to put buffers and the fallback's parameters back."""
        return self.buffers.copies() + (self.fallback.copies() if self.fallback else [])

    def own_work(self) -> contextlib.AbstractContextManager[None]:
        """Context of the optimizer's own work."""
        return own_work(self.device, self.settings.matmul_precision, self.trace)
