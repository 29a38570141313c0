"""KBFGS and KBFGSL: the optimizers' face and the order of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from kbfgs_ext import ops
from kbfgs_ext.ops import checks
from kbfgs_ext.optim import hyper
from kbfgs_ext.optim.base import CoveredOptimizer
from kbfgs_ext.optim.capture import Pass
from kbfgs_ext.optim.factors import LayerFactors, Plan
from kbfgs_ext.optim.method import KBFGSLMethod, KBFGSMethod
from kbfgs_ext.optim.passes import RandomState, SecondPass
from kbfgs_ext.optim.safeguard import SafeguardRule

Closure = Callable[[], torch.Tensor]
HESSIAN_ACTIONS = ("ema", "minibatch")


class KBFGS(CoveredOptimizer):
    """K-BFGS: a Kronecker-factored quasi-Newton method with damped BFGS updates of both factors.

    Per covered layer with gradient D (n_g x n_a, bias as the last column) and per step:

        M <- momentum*M + (1-momentum)*(D + weight_decay*[W, b]),  [W, b] <- [W, b] - lr*H_g M H_a

    then a second pass on the same minibatch at the new weights gives the pair that updates H_g;
    H_a follows from the activations (kbfgs_ext/ops/README.md has every equation).

    Args:
        model: its `torch.nn.Linear` layers with a trained weight are covered; every other trained
            parameter goes to ``fallback``, and a warning names them once.
        lr: learning rate, at least 0; a number or a scalar tensor.
        damping: Levenberg-Marquardt damping (lambda), above 0. Both sides take its square root.
        momentum: decay of M, in [0, 1).
        stat_decay: decay of the activation factor A, in [0, 1).
        pair_decay: decay of the averaged pair (s, y), in [0, 1); 0 for full-batch training.
        damping_a, damping_g: lam_a and lam_g themselves; None takes sqrt(damping).
        powell: threshold mu1 of Powell's damping, in [0, 1).
        weight_decay: coefficient of the L2 term in the gradient, at least 0.
        hessian_action: "minibatch" forms A's product with a vector from the minibatch itself, "ema"
            keeps the moving average A (the paper's; twice the memory on the activation side).
        safeguard: undo a step, on the device, whose second pass shows a higher or non-finite loss,
            and shorten the next; a `SafeguardRule` says how much. False is the paper's recursion.
        backend: of the ops: "auto", "reference", "cpu", "cuda" or "triton".
        fallback: makes the optimizer of the parameters that are not covered from a list of them;
            None takes `torch.optim.AdamW` with torch's defaults.
        freeze_second_pass: leave the weight gradients out of the second pass. They are not needed;
            False computes them all the same (the plain form of the method, for comparison).

    Raises:
        TypeError: ``model`` is no module, or a covered weight is not real floating point.
        ValueError: a hyperparameter is out of its range; ``model`` has no layer to cover; its
            covered layers are on several devices.

    Source: Goldfarb, Ren, Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural
    Networks", NeurIPS 2020.
    """

    memory: int | None = None  # pairs of K-BFGS(L)

    def __init__(
        self,
        model: nn.Module,
        lr: float | torch.Tensor = 0.3,
        damping: float = 0.3,
        momentum: float = 0.9,
        stat_decay: float = 0.9,
        pair_decay: float = 0.9,
        *,
        damping_a: float | None = None,
        damping_g: float | None = None,
        powell: float = 0.2,
        weight_decay: float = 0.0,
        hessian_action: str = "minibatch",
        safeguard: bool | SafeguardRule = True,
        backend: str = "auto",
        fallback: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer] | None = None,
        freeze_second_pass: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}: the optimizer"
                " watches layers, so it needs the model rather than model.parameters()"
            )
        if hessian_action not in HESSIAN_ACTIONS:
            raise ValueError(
                f"hessian_action must be one of {HESSIAN_ACTIONS}, got {hessian_action!r}"
            )
        checks.backend(backend)
        defaults = {
            "lr": lr,
            "damping": damping,
            "damping_a": damping_a,
            "damping_g": damping_g,
            "momentum": momentum,
            "stat_decay": stat_decay,
            "pair_decay": pair_decay,
            "powell": powell,
            "weight_decay": weight_decay,
        }
        hyper.check_group(defaults)

        if not isinstance(safeguard, (bool, SafeguardRule)):
            raise TypeError(f"safeguard must be a bool or a SafeguardRule, got {safeguard!r}")
        self.safeguard = safeguard is not False
        rule = safeguard if isinstance(safeguard, SafeguardRule) else SafeguardRule()
        self.freeze_second_pass = bool(freeze_second_pass)
        plan = Plan(keep_A=hessian_action == "ema", memory=self.memory)
        self._method = (KBFGSMethod if self.memory is None else KBFGSLMethod)(plan, backend)
        super().__init__(model, defaults, plan, fallback, rule)

    def step(self, closure: Closure | None = None) -> torch.Tensor:  # type: ignore[override]
        """One iteration: the closure runs twice, on the same minibatch.

        Args:
            closure: zeroes the gradients, runs the model on one minibatch, calls ``backward()`` on
                the loss and returns it. It must do the same thing both times; torch's random
                numbers (dropout) and the model's buffers (BatchNorm) are looked after.

        Returns:
            The loss of the first pass, as the closure returned it.

        A non-finite loss or gradient voids the step: parameters and state stay, and ``counters()``
        counts it. Nothing is read back to the host, but for one flag in the very first step.

        Raises:
            TypeError: ``closure`` is missing, or returns no scalar.
            RuntimeError: ``closure`` has not called ``backward()``.
            ValueError: a hyperparameter is out of its range, or a layer's input is empty.
        """
        if closure is None or not callable(closure):
            raise TypeError(
                f"closure must be a function that returns the loss, got {closure!r}:"
                " the method evaluates every minibatch twice"
            )
        for covered in self._covered:
            hyper.check_group(covered.group)
        self._materialize()
        random = RandomState(self._guard.scale.device)
        loss = self._run(closure, Pass.FIRST)
        with torch.no_grad():
            value = _scalar(loss, self._guard.scale)
            active = self._active()
            ok = self._finite(value, active)
            self._guard.count(ok)
            if not all(layer.started for layer in active) and not _known_true(ok):
                return loss  # nothing to start the factors from yet
            for group, layers, scalars in self._split(active):
                scalars.update(group, self._guard.scale)
                self._method.statistics(layers, group, ok)
                self._method.descend(layers, group, scalars, self._scratch(layers), ok)
                if not self._plan.keep_A:
                    self._method.curvature_from_activations(layers, group, scalars, ok)
            for layer in active:
                layer.slot.inputs.clear()  # the activations need not outlive the first pass
            if self._fallback is not None:
                self._fallback.step(ok)

        second = SecondPass(self._parameters(), random, self._buffers, self.freeze_second_pass)
        try:
            with second:
                loss_next = self._run(closure, Pass.SECOND)
        except BaseException:
            with torch.no_grad():
                self._undo(active, torch.ones_like(ok))
            raise
        with torch.no_grad():
            value_next = _scalar(loss_next, self._guard.scale)
            if self.safeguard:
                self._undo(active, self._guard.judge(value, value_next, ok))
            ok_pair = ok & torch.isfinite(value_next)
            seen_twice = [layer for layer in active if layer.slot.gradients > 0]
            for group, layers, scalars in self._split(seen_twice):
                self._method.curvature(layers, group, scalars, ok, ok_pair)
        return loss

    def _run(self, closure: Closure, which: Pass) -> torch.Tensor:
        """The closure, with the hooks in the given state."""
        suffix = "_next" if which is Pass.SECOND else ""
        for layer in self._layers():
            layer.slot.begin(layer["h_bar" + suffix], layer["g_bar" + suffix])
        with self._recording(which), torch.enable_grad():
            return closure()

    @contextlib.contextmanager
    def _recording(self, which: Pass) -> Iterator[None]:
        self._recorder.at = which
        try:
            yield
        finally:
            self._recorder.at = Pass.OFF

    def _active(self) -> list[LayerFactors]:
        """The layers that this minibatch has used and reached with gradients."""
        active = [layer for layer in self._layers() if layer.has_gradients()]
        if not active:
            raise RuntimeError(
                "closure must call backward() on a loss that depends on the covered layers, and"
                " leave their gradients in place: no gradient has reached any of"
                f" {', '.join(layer.name for layer in self._layers())}"
            )
        return active

    def _finite(self, value: torch.Tensor, active: list[LayerFactors]) -> torch.Tensor:
        """Whether the loss and every gradient are finite, as a bool scalar on the device."""
        parameters: list[torch.Tensor] = [p for layer in active for p in layer.parameters()]
        if self._fallback is not None:
            parameters += self._fallback.parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        norms = torch._foreach_norm(gradients)
        largest = torch.stack([n.to(value) for n in norms]).sum()
        return torch.isfinite(value) & torch.isfinite(largest)

    def _undo(self, active: list[LayerFactors], undo: torch.Tensor) -> None:
        """Put every parameter back where ``undo``."""
        self._method.undo(active, undo)
        if self._fallback is not None:
            self._fallback.undo(undo)

    def warm_start(self, batches: Iterable[Any]) -> None:
        """Start the activation factors from more than the first minibatch.

        A_0 is the plain average of X~'X~/m over ``batches``; without a warm start it is the first
        minibatch's. The model runs forward alone; its buffers and torch's random numbers are left
        as they were.

        Args:
            batches: iterable of model inputs: a tensor, a tuple of positional arguments or a dict
                of keyword arguments each. The training set once over is the paper's choice.

        Raises:
            RuntimeError: training has started already.
            ValueError: ``batches`` is empty, or a batch gives non-finite activations.
        """
        if any(layer.started for layer in self._layers()):
            raise RuntimeError("warm_start must come before the first step")
        self._materialize()
        random = RandomState(self._guard.scale.device)
        self._buffers.save()
        finite: list[torch.Tensor] = []
        try:
            with torch.no_grad(), self._recording(Pass.WARM):
                for batch in batches:
                    finite.append(self._warm_batch(batch))
        finally:
            random.restore()
            self._buffers.restore()
        bad = [i for i, fine in enumerate(finite) if not fine]
        if bad or not finite:
            for layer in self._layers():
                layer.average(self._plan).zero_()
                layer.warm_batches = 0
            raise ValueError(
                f"batches: batch {bad[0]} gives non-finite activations"
                if bad
                else "batches is empty: warm_start needs at least one batch"
            )

    def _warm_batch(self, batch: Any) -> torch.Tensor:
        """Average one batch into the factors; whether its activations are finite."""
        for layer in self._layers():
            layer.slot.begin(layer["h_bar"], layer["g_bar"])
        if isinstance(batch, Mapping):
            self.model(**batch)
        elif isinstance(batch, (tuple, list)):
            self.model(*batch)
        else:
            self.model(batch)
        fine = torch.ones((), dtype=torch.bool, device=self._guard.scale.device)
        for layer in self._layers():
            if layer.slot.inputs:
                k = layer.warm_batches
                A, a_bar, X = layer.average(self._plan), layer["a_bar"], layer.slot.X()
                ops.factor_ema_([A], [a_bar], [X], k / (k + 1), None, self._method.backend)
                layer.warm_batches = k + 1
                layer.slot.inputs.clear()
                fine &= torch.isfinite(a_bar).all()
        return fine


class KBFGSL(KBFGS):
    """K-BFGS(L): K-BFGS with the gradient factor kept as its last ``memory`` pairs.

    H_g is applied by the two-loop recursion or the compact form, whichever is faster; the memory
    of a layer's gradient side is 2*memory*n_g in place of n_g^2.

    Args:
        model, lr, damping, momentum, stat_decay, pair_decay: as in `KBFGS`.
        memory: pairs kept, at least 1.
        options: the other arguments of `KBFGS`.

    Raises:
        TypeError, ValueError: as `KBFGS`, and for ``memory``.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | torch.Tensor = 0.3,
        damping: float = 0.3,
        momentum: float = 0.9,
        stat_decay: float = 0.9,
        pair_decay: float = 0.9,
        *,
        memory: int = 100,
        **options: Any,
    ) -> None:
        hyper.check_memory(memory)
        self.memory = memory
        super().__init__(model, lr, damping, momentum, stat_decay, pair_decay, **options)


def _scalar(loss: Any, like: torch.Tensor) -> torch.Tensor:
    """The loss as a detached scalar of ``like``'s dtype and device."""
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and not loss.is_complex():
        return loss.detach().reshape(()).to(like)
    if isinstance(loss, float):
        return torch.full_like(like, loss)
    shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
    raise TypeError(
        f"closure must return the loss as a real scalar, got {type(loss).__name__}{shape}"
    )


def _known_true(flag: torch.Tensor) -> bool:
    """The host's one look at the device, before the factors start: is the first batch sound?

    A fake tensor has no value; the shapes of a step are then followed through its usual course.
    """
    return isinstance(flag, FakeTensor) or bool(flag)
