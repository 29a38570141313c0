"""KBFGS and KBFGSL: the optimizers' face."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from kbfgs_ext.optim import gradients, hyper
from kbfgs_ext.optim.base import CoveredOptimizer
from kbfgs_ext.optim.compiled import uncompiled
from kbfgs_ext.optim.rules import DirectionRule, FactorRule, Precision, RankRule
from kbfgs_ext.optim.safeguard import SafeguardRule
from kbfgs_ext.optim.settings import Settings
from kbfgs_ext.optim.step import FINISH, SECOND
from kbfgs_ext.optim.warm_start import warm_start

Closure = Callable[[], torch.Tensor]


class KBFGS(CoveredOptimizer):
    """K-BFGS: a Kronecker-factored quasi-Newton method with damped BFGS updates of both factors.

    Per covered layer with gradient D (n_g x n_a, bias as the last column) and per step:

        M <- momentum*M + (1-momentum)*(D + weight_decay*[W, b]),  P = H_g M H_a

    H_a follows from the activations; in every ``pair_every``-th step a second pass on the same
    minibatch, at the new weights, gives the pair that updates H_g. The paper moves [W, b] by -lr*P.
    By default a step goes along the polar factor of M H_a, or of H_g M in a layer with more outputs
    than inputs, whose singular values are all 1, with M looked a gradient ahead and the length lr
    in every layer (kbfgs_ext/ops/README.md has every equation).
    The defaults are the setting that is best in general; let ``lr`` fall towards 0 by a schedule.
    `presets.PUBLISHED` is the paper's method to the letter.

    Args:
        model: layers of a known kind with a trained weight are covered: `torch.nn.Linear`,
            convolutions, grouped and transposed ones too, `torch.nn.MultiheadAttention`,
            transformers' `Conv1D`, and what `register_kind` was given.
            Every other trained parameter goes to ``fallback``, and a warning says so once.
        lr: learning rate, at least 0; a number or a scalar tensor. By default it is the length of a
            step in every layer: the root mean square over the rows of [W, b].
        weight_decay: coefficient of the L2 term in the gradient, at least 0.
        momentum: decay of M, in [0, 1).
        damping: Levenberg-Marquardt damping (lambda), above 0; a number or a scalar tensor. Both
            sides take its square root; see `FactorRule` for its unit.
        pair_every: make the second pass, and with it the pair and the safeguard's judgement, in
            every pair_every-th step, beginning with the first. The steps between are not judged.
        max_grad_norm: largest norm of all gradients together; a larger gradient is scaled down to
            it. The pair is made of unclipped gradients. None does not clip.
        groups: layers with hyperparameters of their own: dicts with "params" (a module, a
            parameter, or an iterable of them) and any of lr, weight_decay, momentum, the dampings,
            the decays and powell.
        fallback: makes the optimizer of the parameters that are not covered from a list of them;
            None takes `torch.optim.AdamW` with torch's defaults.
        exclude: layers that go to the fallback: modules, with all that is in them, and names or
            patterns of names ("head", "blocks.*.qkv").
        process_group: of several processes that train the model together, each on its own part of
            every minibatch: gradients and statistics are averaged over them, and all take the
            same step (docs/distributed.md). None takes the group of `DistributedDataParallel`, if
            ``model`` is wrapped in it.

    Other Args:
        direction: where a step goes: "spectral", "newton" (the paper's), or a `DirectionRule`,
            which says how far as well.
        safeguard: undo a step, on the device, whose second pass shows a non-finite loss, and
            shorten the next. With direction="newton" also one that shows a higher loss; and
            shorten the next after a step that brought less than half of what its slope promises.
            A `SafeguardRule` says how much. False is the paper's recursion.
        factors: how factors start, are damped, updated and restarted: a `FactorRule`.
        precision: of the optimizer's own numbers: a `Precision`.
        ranks: how several processes train together: a `RankRule`.
        stat_decay: decay of the activation factor A, in [0, 1).
        pair_decay: decay of the averaged pair (s, y), in [0, 1); 0 for full-batch training.
        damping_a, damping_g: lam_a and lam_g themselves; None takes sqrt(damping).
        powell: threshold mu1 of Powell's damping, in [0, 1).
        hessian_action: "minibatch" forms A's product with a vector from the minibatch itself, "ema"
            keeps the moving average A (the paper's; twice the memory on the activation side).
        block_size: largest block of a factor. A side of a layer (n_a or n_g) that is longer has a
            block-diagonal factor, of blocks of nearly equal size: its memory grows with the side,
            not with the square of it. "auto" is 256, but 2048 for the inputs of convolutions and
            with direction="newton"; None makes one block of every side, however long.
        memory: keep the gradient factor as its last ``memory`` pairs, at least 1: K-BFGS(L), for
            which `KBFGSL` is the name. None keeps it as a matrix.
        context: modules outside ``model`` that the closure runs too, such as a frozen or otherwise
            trained backbone: their buffers and gradients see one pass, as those of ``model`` do.
        generators: `torch.Generator` objects that the closure draws from; both passes get the same
            numbers, as from torch's own.
        backend: of the ops: "auto", "reference", "cpu", "cuda" or "triton".
        torch_keywords: keywords of torch's own optimizers. foreach, fused and capturable change
            nothing, for every step is all that; maximize and differentiable are refused.

    Raises:
        TypeError: ``model`` is no module, a keyword is unknown or a rule's, or a covered weight is
            not real floating point.
        ValueError: a hyperparameter is out of its range; ``model`` has no layer to cover; its
            covered layers are on several devices; ``groups`` do not fit the model.
        NotImplementedError: ``model`` is sharded by other means than `fully_shard`.

    Source: Goldfarb, Ren, Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural
    Networks", NeurIPS 2020.
    """

    _step_supports_amp_scaling = True  # GradScaler.step then asks us, and `step` can say no

    def __init__(
        self,
        model: nn.Module,
        lr: float | torch.Tensor = 0.05,
        damping: float | torch.Tensor = 1.0,
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
        pair_every: int = 10,
        block_size: int | str | None = "auto",
        max_grad_norm: float | None = None,
        direction: str | DirectionRule = "spectral",
        factors: FactorRule = FactorRule(),
        precision: Precision = Precision(),
        ranks: RankRule = RankRule(),
        groups: Iterable[Mapping[str, Any]] = (),
        fallback: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer] | None = None,
        exclude: nn.Module | str | Iterable[nn.Module | str] = (),
        context: nn.Module | Iterable[nn.Module] | None = None,
        generators: Iterable[torch.Generator] = (),
        process_group: torch.distributed.ProcessGroup | None = None,
        memory: int | None = None,
        **torch_keywords: bool | None,
    ) -> None:
        hyper.check_torch_keywords(torch_keywords)
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
        settings = Settings.of(
            direction,
            factors,
            precision,
            memory=memory,
            hessian_action=hessian_action,
            safeguard=safeguard,
            backend=backend,
            max_grad_norm=max_grad_norm,
            pair_every=pair_every,
            block_size=block_size,
        )
        around = exclude, context, generators, process_group, ranks
        super().__init__(model, settings, defaults, groups, fallback, *around)

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
        counts it. Nothing is read back to the host, but for one flag in the very first step. An
        exception, whoever raises it, takes the step back.

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
        return self.step_once(closure, scaler)

    @uncompiled
    def step_once(
        self, closure: Closure, scaler: torch.amp.GradScaler | None = None
    ) -> torch.Tensor:
        """`step` without its checks of the call, and without hooks."""
        with self.steps.first_pass():
            loss = closure()
        self.steps.descend(loss, self._unscale(scaler))
        if self.steps.second_pass_wanted:
            with self.steps.second_pass():
                loss_next = closure()
            self.steps.finish(loss_next)
        return loss

    def _unscale(self, scaler: torch.amp.GradScaler | None) -> Callable[[], torch.Tensor | None]:
        return functools.partial(gradients.unscale, self, scaler, self.steps.device)

    # ------------------------------------------------------------------ the four calls of a step

    def first_pass(self) -> contextlib.AbstractContextManager[None]:
        """Context: zero the gradients, run the model on a minibatch, call ``backward()``.

        The four calls are for loops that own forward and backward. A step that was not carried to
        its end before stays as it is, without a pair.

        Raises:
            RuntimeError: under ``torch.inference_mode()``, or inside a pass.
            ValueError: a hyperparameter is out of its range, or a layer's input is empty.
        """
        return self.steps.first_pass()

    def descend(self, loss: torch.Tensor, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Take the step, with the factors as they stand.

        Args:
            loss: of the first pass, whole and unscaled; with micro-batches, their sum.
            scaler: whose ``scale(loss)`` went backward, if it did.

        Raises:
            TypeError: ``loss`` is no real scalar.
            RuntimeError: out of order, or no gradient has reached a covered layer.
        """
        gradients.check_scaler(scaler)
        self._run_pre_hooks()
        self.steps.descend(loss, self._unscale(scaler))
        if not self.second_pass_due:
            self._run_post_hooks()

    @property
    def second_pass_due(self) -> bool:
        """Whether the step under way wants a second pass: all do, unless ``pair_every`` > 1."""
        return self.steps.due in (SECOND, FINISH)

    def second_pass(self) -> contextlib.AbstractContextManager[None]:
        """Context: the same minibatch again, at the new weights, and ``backward()``.

        Inside, torch's random numbers are those of the first pass and the weights want no
        gradient; afterwards buffers and gradients are as the first pass left them. An exception
        inside takes the step back.

        Raises:
            RuntimeError: out of order, or the step has no second pass (``second_pass_due``).
        """
        return self.steps.second_pass()

    def finish(self, loss: torch.Tensor) -> None:
        """End the step: the safeguard's judgement, the pair and the curvature.

        Args:
            loss: of the second pass, whole and unscaled.

        Raises:
            TypeError: ``loss`` is no real scalar.
            RuntimeError: out of order.
        """
        self.steps.finish(loss)
        self._run_post_hooks()

    @contextlib.contextmanager
    def replayed_step(self) -> Iterator[None]:
        """Context of a captured step's replay: what a step does on the host around its kernels."""
        self._run_pre_hooks()
        for group in self.steps.parts.groups:
            hyper.check_group(group.options)
            with torch.no_grad():
                group.scalars.refresh(group.options)
        yield
        self.steps.number += 1
        self._run_post_hooks()

    # ------------------------------------------------------------------ starts

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
        warm_start(self.model, self.steps, batches)

    def restart(self) -> None:
        """Start factors, pairs and momentum anew, from the activations of the next minibatch.

        For a run whose data, loss or dampings have changed for good. Without it the factors follow
        by themselves, but H_a slowly, since a step shows it one direction. Parameters, fallback,
        hyperparameters and counts stay, the safeguard's scale is 1 again, and a captured step is
        void. `warm_start` may follow.

        Raises:
            RuntimeError: a step is under way.
        """
        self.steps.restart()


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
        lr: float | torch.Tensor = 0.05,
        damping: float | torch.Tensor = 1.0,
        momentum: float = 0.9,
        stat_decay: float = 0.9,
        pair_decay: float = 0.9,
        *,
        memory: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(
            model, lr, damping, momentum, stat_decay, pair_decay, memory=memory, **options
        )
