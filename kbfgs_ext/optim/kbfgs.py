"""KBFGS and KBFGSL: the optimizers' face and the order of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kbfgs_ext import ops
from kbfgs_ext.ops import checks
from kbfgs_ext.optim import gradients, hyper
from kbfgs_ext.optim.capture import Pass, uncompiled
from kbfgs_ext.optim.factors import Plan
from kbfgs_ext.optim.method import KBFGSLMethod, KBFGSMethod
from kbfgs_ext.optim.passes import RandomState
from kbfgs_ext.optim.safeguard import SafeguardRule
from kbfgs_ext.optim.stepping import Closure, SteppingOptimizer

HESSIAN_ACTIONS = ("ema", "minibatch")


class KBFGS(SteppingOptimizer):
    """K-BFGS: a Kronecker-factored quasi-Newton method with damped BFGS updates of both factors.

    Per covered layer with gradient D (n_g x n_a, bias as the last column) and per step:

        M <- momentum*M + (1-momentum)*(D + weight_decay*[W, b]),  [W, b] <- [W, b] - lr*H_g M H_a

    then a second pass on the same minibatch at the new weights gives the pair that updates H_g;
    H_a follows from the activations (kbfgs_ext/ops/README.md has every equation).

    Args:
        model: its `torch.nn.Linear` layers with a trained weight are covered; every other trained
            parameter goes to ``fallback``, and a warning names them once.
        lr: learning rate, at least 0; a number or a scalar tensor. With step_length="layer" it is
            the length of a step in every layer.
        damping: Levenberg-Marquardt damping (lambda), above 0; a number or a scalar tensor. Both
            sides take its square root.
        momentum: decay of M, in [0, 1).
        stat_decay: decay of the activation factor A, in [0, 1).
        pair_decay: decay of the averaged pair (s, y), in [0, 1); 0 for full-batch training.
        damping_a, damping_g: lam_a and lam_g themselves; None takes sqrt(damping).
        powell: threshold mu1 of Powell's damping, in [0, 1).
        weight_decay: coefficient of the L2 term in the gradient, at least 0.
        hessian_action: "minibatch" forms A's product with a vector from the minibatch itself, "ema"
            keeps the moving average A (the paper's; twice the memory on the activation side).
        safeguard: undo a step, on the device, whose second pass shows a higher or non-finite loss,
            and shorten the next; after a step that brought less than half of what its slope
            promises, too. A `SafeguardRule` says how much. False is the paper's recursion.
        backend: of the ops: "auto", "reference", "cpu", "cuda" or "triton".
        fallback: makes the optimizer of the parameters that are not covered from a list of them;
            None takes `torch.optim.AdamW` with torch's defaults.
        freeze_second_pass: leave the weight gradients out of the second pass. They are not needed;
            False computes them all the same (the plain form of the method, for comparison).
        groups: layers with hyperparameters of their own: dicts with "params" (a module, a
            parameter, or an iterable of them) and any of lr to powell and weight_decay.
        max_grad_norm: largest norm of all gradients together; a larger gradient is scaled down to
            it. The pair is made of unclipped gradients. None does not clip.
        matmul_precision: of the optimizer's own float32 products, in the words of
            `torch.set_float32_matmul_precision`; None leaves torch's setting, which is float32
            throughout unless changed.
        pair_every: make the second pass, and with it the pair and the safeguard's judgement, in
            every pair_every-th step, beginning with the first. The steps between are not judged.
        factor_every: update the activation side (A and H_a) in every factor_every-th step.
        max_factor_dim: a side of a layer (n_a or n_g) that is larger keeps no factor: the identity
            takes its place, and a warning names it once. K-BFGS(L) keeps its pairs all the same.
        restart_after: put a factor back to its start, on the device, after so many rejected pairs
            in a row; and all of them after so many steps in a row that the safeguard has undone at
            its smallest scale, or when it sees the loss surge. None never does.
        initial_scale: gamma, above 0: H_g starts as gamma*I, the paper's as I. "damping" takes
            1/lam_g, the inverse of a curvature of which the damping is all that is known.
        step_length: "direction" moves a layer by -lr*P, the paper's. "balanced" shares the
            length alike: -lr*(R/r)*P, with r the root mean square of the rows of a layer's P and R
            that of the rows of all P of its param group (of the layers with the same factors).
            "layer" takes from P the direction alone: -lr*P/r.
        exclude: layers that go to the fallback: modules, with all that is in them, and names or
            patterns of names ("head", "blocks.*.qkv").
        context: modules outside ``model`` that the closure runs too, such as a frozen or otherwise
            trained backbone: their buffers and gradients see one pass, as those of ``model`` do.
        generators: `torch.Generator` objects that the closure draws from; both passes get the same
            numbers, as from torch's own.
        torch_keywords: keywords of torch's own optimizers. foreach, fused and capturable change
            nothing, for every step is all that; maximize and differentiable are refused.

    Raises:
        TypeError: ``model`` is no module, or a covered weight is not real floating point.
        ValueError: a hyperparameter is out of its range; ``model`` has no layer to cover; its
            covered layers are on several devices; ``groups`` do not fit the model.

    Source: Goldfarb, Ren, Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural
    Networks", NeurIPS 2020.
    """

    memory: int | None = None  # pairs of K-BFGS(L)
    _step_supports_amp_scaling = True  # GradScaler.step then asks us, and `step` can say no

    def __init__(
        self,
        model: nn.Module,
        lr: float | torch.Tensor = 0.3,
        damping: float | torch.Tensor = 0.3,
        momentum: float = 0.9,
        stat_decay: float = 0.9,
        pair_decay: float = 0.9,
        *,
        damping_a: float | torch.Tensor | None = None,
        damping_g: float | torch.Tensor | None = None,
        powell: float = 0.2,
        weight_decay: float = 0.0,
        hessian_action: str = "minibatch",
        safeguard: bool | SafeguardRule = True,
        backend: str = "auto",
        fallback: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer] | None = None,
        freeze_second_pass: bool = True,
        groups: Iterable[Mapping[str, Any]] = (),
        max_grad_norm: float | None = None,
        matmul_precision: str | None = None,
        pair_every: int = 1,
        factor_every: int = 1,
        max_factor_dim: int | None = None,
        restart_after: int | None = 10,
        initial_scale: float | str = 1.0,
        step_length: str = "direction",
        exclude: nn.Module | str | Iterable[nn.Module | str] = (),
        context: nn.Module | Iterable[nn.Module] | None = None,
        generators: Iterable[torch.Generator] = (),
        **torch_keywords: bool | None,
    ) -> None:
        hyper.check_torch_keywords(torch_keywords)
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
        hyper.check_options(
            max_grad_norm,
            matmul_precision,
            pair_every,
            factor_every,
            max_factor_dim,
            restart_after,
            initial_scale,
            step_length,
        )
        if not isinstance(safeguard, (bool, SafeguardRule)):
            raise TypeError(f"safeguard must be a bool or a SafeguardRule, got {safeguard!r}")
        self.safeguard = safeguard is not False
        rule = safeguard if isinstance(safeguard, SafeguardRule) else SafeguardRule()
        self.freeze_second_pass = bool(freeze_second_pass)
        self.max_grad_norm, self.matmul_precision = max_grad_norm, matmul_precision
        self.pair_every, self.factor_every = pair_every, factor_every
        plan = Plan(
            hessian_action == "ema", self.memory, max_factor_dim, restart_after, initial_scale
        )
        method = KBFGSMethod if self.memory is None else KBFGSLMethod
        self._method = method(plan, backend, step_length)
        super().__init__(
            model, defaults, groups, plan, fallback, rule, backend, exclude, context, generators
        )

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, scaler: torch.amp.GradScaler | None = None
    ) -> torch.Tensor:
        """One iteration: the closure runs twice, on the same minibatch; once in the steps that
        ``pair_every`` leaves without a second pass.

        Args:
            closure: zeroes the gradients, runs the model on one minibatch, calls ``backward()`` on
                the loss and returns it. It must do the same thing both times; torch's random
                numbers (dropout) and the model's buffers (BatchNorm) are looked after. It may go
                through the minibatch in several parts, and then returns the sum of their losses.
            scaler: the gradient scaler whose ``scale(loss)`` the closure sends backward; it still
                returns the unscaled loss. Call ``scaler.update()`` after the step.

        Returns:
            The loss of the first pass, as the closure returned it.

        A non-finite loss or gradient voids the step: parameters and state stay, and ``counters()``
        counts it. Nothing is read back to the host, but for one flag in the very first step.

        Raises:
            TypeError: ``closure`` is missing, or returns no scalar; called by ``scaler.step``.
            RuntimeError: ``closure`` has not called ``backward()``, or ran without gradients.
            ValueError: a hyperparameter is out of its range, or a layer's input is empty.
        """
        if hasattr(self, "grad_scale"):  # put here by GradScaler.step
            del self.grad_scale, self.found_inf  # type: ignore[attr-defined]
            raise TypeError(
                "scaler.step(optimizer) cannot evaluate a minibatch twice: call"
                " optimizer.step(closure, scaler=scaler), then scaler.update()"
            )
        if closure is None or not callable(closure):
            raise TypeError(
                f"closure must be a function that returns the loss, got {closure!r}:"
                " the method evaluates every minibatch twice (loops without a closure call"
                " first_pass, descend, second_pass and finish)"
            )
        gradients.check_scaler(scaler)
        return self._step(closure, scaler)

    @uncompiled
    def _step(self, closure: Closure, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
        """`step` without its checks of the call, and without hooks."""
        loss = self._run(closure, Pass.FIRST)
        self._descend(loss, scaler)
        if self._flight is None or not self._flight.active:
            self._flight = None
            return loss  # this step has no second pass
        self._finish(self._run(closure, Pass.SECOND))
        return loss

    def _run(self, closure: Closure, which: Pass) -> torch.Tensor:
        """The closure in one of the two passes."""
        with self.first_pass() if which is Pass.FIRST else self.second_pass():
            return closure()

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
        random = RandomState(self._guard.scale.device, self._generators)
        self._buffers.save()
        finite: list[torch.Tensor] = []
        try:
            with self._recording(Pass.WARM):
                for batch in batches:
                    finite.append(self._warm_batch(batch))
        finally:
            random.restore()
            self._buffers.restore()
        bad = [i for i, fine in enumerate(finite) if not fine]
        if bad or not finite:
            for layer in self._layers():
                if layer.has("H_a"):
                    layer.average(self._plan).zero_()
                layer.warm_batches = 0
            raise ValueError(
                f"batches: batch {bad[0]} gives non-finite activations"
                if bad
                else "batches is empty: warm_start needs at least one batch"
            )

    def restart(self) -> None:
        """Start factors, pairs and momentum anew, from the activations of the next minibatch.

        For a run whose data, loss or dampings have changed for good. Without it the factors follow
        by themselves, but H_a slowly, since a step shows it one direction. Parameters, fallback,
        hyperparameters and counts stay, the safeguard's scale is 1 again, and a captured step is
        void. `warm_start` may follow.

        Raises:
            RuntimeError: a step is under way.
        """
        if self._flight is not None:
            raise RuntimeError(f"restart() is out of order: {self._flight.next} comes next")
        for layer in self._layers():
            layer.reset()
        self._guard.reset()
        self._generation += 1

    def _warm_batch(self, batch: Any) -> torch.Tensor:
        """Average one batch into the factors; whether its activations are finite."""
        for layer in self._layers():
            layer.observer.begin(None, layer["g_bar"], keep_inputs=layer.has("H_a"))
        if isinstance(batch, Mapping):
            self.model(**batch)
        elif isinstance(batch, (tuple, list)):
            self.model(*batch)
        else:
            self.model(batch)
        fine = torch.ones((), dtype=torch.bool, device=self._guard.scale.device)
        for layer in self._layers():
            if layer.observer.has_inputs():
                k = layer.warm_batches
                A, a_bar, X = layer.average(self._plan), layer["a_bar"], layer.observer.X()
                with self._own_work():
                    ops.factor_ema_([A], [a_bar], [X], k / (k + 1), None, self._method.backend)
                layer.warm_batches = k + 1
                layer.observer.forget_inputs()
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
        damping: float | torch.Tensor = 0.3,
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
