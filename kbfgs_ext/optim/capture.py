"""Capture: what the two passes of a step leave behind.

A covered layer is linear on its rows, h = W x + b, so two things are enough:

    its input     a forward hook of the module sees the rows X; their mean is a_bar
    g_bar         the gradient of the layer's bias, as the backward pass leaves it in `.grad`

h_bar = W a_bar follows, and so does its change (`output_change_`). A layer without a trained bias
gets a virtual one: a zero that the hook adds to the output, whose gradient autograd fills as any
other's.

Only a backward pass that fills `.grad` counts: gradients taken inside a closure (penalties,
physics, attacks) never reach a bias's `.grad`, and a use of a layer that no such pass reaches has
no part in the loss. A layer that is used several times in one pass has the rows of all uses.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

from kbfgs_ext.optim.inputs import Inputs, features_last
from kbfgs_ext.optim.layers import View
from kbfgs_ext.optim.shards import is_sharded, version

_ZEROED = -1  # the version of a gradient of which the step knows that it is zero
_NEVER: tuple[Any, int] = (lambda: None), 0


class Pass(enum.Enum):
    """What the hooks do at present."""

    OFF = "off"
    WARM = "warm start"  # inputs alone
    FIRST = "first pass"
    SECOND = "second pass"


@dataclasses.dataclass
class Use:
    """One call of a covered layer in a pass."""

    rows: int
    inputs: Inputs | None  # where they are wanted
    mean: torch.Tensor | None  # d_in, where that is enough; the first use's stands in a_bar
    reached: bool = False  # by a backward pass that fills .grad


class Observer:
    """What one layer leaves behind in a pass. Buffers are kept from step to step."""

    def __init__(self, name: str, view: View, bias: torch.Tensor | None) -> None:
        self.name = name
        self.view = view
        self.n_g, self.d_in = view.shape
        self.sharded = is_sharded(view.weight)  # where a virtual bias stands in for the real one
        self.averaged = False  # the bias's gradient is in the end that of all ranks, by DDP
        self.weight: torch.Tensor = view.weight
        self.bias = bias  # trained with the layer
        self.gradient_hook: Callable[[torch.Tensor], None] = lambda anchor: None
        self._virtual: torch.Tensor | None = None
        self._accumulators: dict[int, tuple[Any, Any]] = {}
        self._zeros: dict[int, tuple[Any, int]] = {}  # gradients that `note_zeros` has seen
        self._means: list[torch.Tensor] = []  # d_in each: of the second use of a pass and on
        self.begin(None, torch.empty(0, device="cpu"), keep_inputs=False)

    def begin(self, a_bar: torch.Tensor | None, g_bar: torch.Tensor, keep_inputs: bool) -> None:
        """Start a pass.

        Args:
            a_bar: n_a, where the mean row goes if the rows themselves are not kept; None: nowhere.
            g_bar: n_g, where the bias gradient goes.
            keep_inputs: keep the rows of all uses.
        """
        self.uses: list[Use] = []
        self._joined: Inputs | None = None  # of all uses
        self.elsewhere = False  # another rank has seen the layer's input
        self.a_bar, self.g_bar, self.keep_inputs = a_bar, g_bar, keep_inputs
        self.empty: tuple[int, ...] = ()  # shape of an input without rows
        self.dark = self.recomputed = False  # a use without gradients, and again in backward
        self.by_hand = False  # the closure takes gradients by torch.autograd.grad and assigns them
        self.bypassed = False  # backward(inputs=...) leaves the bias out
        self.filled = False  # g_bar holds the bias gradient
        self._before: dict[int, tuple[TensorWeakRef, int]] = {}
        self._checked = True  # that the closure zeroes the gradients first
        if self._virtual is not None:
            self._virtual.grad = None

    def expect_fresh_gradients(self) -> None:
        """From here to the pass's first backward, the closure must drop the gradients of before."""
        zeros, self._zeros = self._zeros, {}
        for p in (self.weight, self.bias):
            if p is not None and (g := p.grad) is not None:
                before, last = zeros.get(id(p), _NEVER)
                now = version(g)
                fresh = before() is g and last == now
                self._before[id(p)] = TensorWeakRef(g), _ZEROED if fresh else now
                self._checked = self._checked and (fresh or not p.requires_grad)

    def note_zeros(self) -> None:
        """The optimizer has zeroed the gradients in place."""
        for p in (self.weight, self.bias):
            if p is not None and (g := p.grad) is not None:
                self._zeros[id(p)] = TensorWeakRef(g), version(g)

    def is_stale(self, p: torch.Tensor) -> bool:
        """Whether the pass has left the gradient of ``p`` as it was before."""
        g = p.grad
        return g is not None and self.kept(p) and self._before[id(p)][1] == version(g)

    def kept(self, p: torch.Tensor) -> bool:
        """Whether the gradient of ``p`` is the very tensor of before the pass, though perhaps
        zeroed: nothing then tells whether a backward has reached it."""
        return p.grad is not None and id(p) in self._before and self._before[id(p)][0]() is p.grad

    # ------------------------------------------------------------------ the bias, real or virtual

    def anchor(self) -> torch.Tensor:
        """The leaf whose gradient is g_bar: the bias, or a zero that stands in for it."""
        if self.bias is not None and self.bias.requires_grad and not self.sharded:
            return self.bias
        if self._virtual is None or self._virtual.device != self.weight.device:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            with torch._C._DisableFuncTorch():  # the first call may come from inside torch.func
                self._virtual = torch.zeros(
                    self.n_g, dtype=wide, device=self.weight.device, requires_grad=True
                )
            self._virtual.register_post_accumulate_grad_hook(self.gradient_hook)
        return self._virtual

    def zero_virtual(self) -> None:
        """What zero_grad() does to the virtual bias."""
        if self._virtual is not None:
            self._virtual.grad = None

    def gradient(self) -> torch.Tensor | None:
        """The gradient of the layer's bias, real or virtual, as the backward pass has left it."""
        anchor = self.anchor()
        if anchor.grad is None or anchor is not self.bias:
            return anchor.grad
        return self.view.vector(anchor.grad)

    # ------------------------------------------------------------------ uses

    def add(self, inputs: Inputs) -> Use:
        """One use, with its input."""
        mean = None
        if self.a_bar is not None and not self.keep_inputs:
            mean = self._mean(self.a_bar, len(self.uses))
            inputs.mean(mean)
        use = Use(inputs.m, inputs if self.keep_inputs else None, mean)
        self.uses.append(use)
        return use

    def _mean(self, a_bar: torch.Tensor, k: int) -> torch.Tensor:
        groups = self.view.groups
        place = a_bar if groups == 1 else a_bar.view(groups, -1)
        if k == 0:
            return place[..., : self.d_in]
        while len(self._means) < k:
            self._means.append(torch.empty_like(place[..., : self.d_in]))
        return self._means[k - 1]

    def reach(self, use: Use, *_: Any) -> None:
        """A backward pass arrives at ``use``: does it fill the layer's gradients?"""
        if self._accumulates():
            use.reached = True
            if not self._checked and not self.by_hand:
                self._check_fresh()
        elif torch.is_grad_enabled():
            use.reached = True  # create_graph=True: the loss is made of these gradients

    def _accumulates(self) -> bool:
        """Whether the backward pass under way fills the gradient of weight or bias."""
        anchor = self.anchor()
        for leaf in (anchor, self.weight):
            if not leaf.requires_grad:
                continue
            try:
                if torch._C._will_engine_execute_node(self._accumulator(leaf)):
                    self.bypassed |= leaf is not anchor
                    return True
            except RuntimeError:  # torch.autograd.grad(loss, parameters): the engine refuses to say
                self.by_hand = True
                return True
        return False

    def _accumulator(self, leaf: torch.Tensor) -> Any:
        """The node of the graph that fills ``leaf.grad``; it stays, unless the leaf is cast, or
        passes go to another stream."""
        key = leaf.dtype, leaf.device
        known = self._accumulators.get(id(leaf))
        if known is None or known[0] != key:
            known = key, torch.autograd.graph.get_gradient_edge(leaf).node
            self._accumulators[id(leaf)] = known
        return known[1]

    def forget_accumulators(self) -> None:
        """Let go of those nodes, so that autograd makes new ones on the present stream."""
        self._accumulators.clear()

    def _check_fresh(self) -> None:
        """The first backward of a step must not add to gradients from before."""
        trained = [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]
        if any(self.is_stale(p) for p in trained):
            raise RuntimeError(
                f"the closure adds to gradients from before the step: that of layer '{self.name}'"
                " is there and has not been zeroed. Both passes must see the same minibatch:"
                " begin the closure with optimizer.zero_grad(), and go through all parts of the"
                " batch inside it"
            )
        self._checked = True
        self.zero_virtual()  # the closure has zeroed the layer's gradients, perhaps by another way

    # ------------------------------------------------------------------ after the pass

    def settle(self) -> None:
        """After the backward pass: keep the uses that it has reached, and their mean."""
        self._first = self.uses[0] if self.uses else None
        self.uses = [use for use in self.uses if use.reached]
        if not self.filled:
            anchor = self.anchor()
            gradient = None if self.averaged or self.is_stale(anchor) else self.gradient()
            if gradient is not None:
                self.g_bar.copy_(gradient)  # the closure has assigned it
            else:
                self.g_bar.zero_()  # the loss does not depend on the bias
            self.filled = gradient is not None or not (self.by_hand or self.bypassed)
        if self.a_bar is not None and not self.keep_inputs and self.uses:
            first, *others = self.uses
            assert first.mean is not None
            place, rows = self._mean(self.a_bar, 0), first.rows
            if first is not self._first:
                place.copy_(first.mean)
            for use in others:
                assert use.mean is not None
                rows += use.rows
                place.lerp_(use.mean, use.rows / rows)

    @property
    def seen(self) -> bool:
        """Whether the layer's input was seen in the pass, in a use that reaches the loss; with
        several ranks, on one of them."""
        return bool(self.uses) or self.elsewhere

    @property
    def complete(self) -> bool:
        """Whether the pass has shown all that a pair needs: a_bar and g_bar."""
        return self.seen and self.filled

    def has_inputs(self) -> bool:
        """Whether the rows themselves are at hand."""
        return self.keep_inputs and self.seen

    def inputs(self) -> Inputs:
        """The input rows of all uses, m x d_in."""
        if self._joined is None:
            first, *others = [use.inputs for use in self.uses if use.inputs is not None]
            self._joined = first.joined(others)
        return self._joined

    @property
    def in_rows(self) -> bool:
        """Whether the inputs are rows, which an op takes as they are; the same on all ranks, with
        inputs or without."""
        return self.view.inputs is features_last

    def forget_inputs(self) -> None:
        """Let go of the activations."""
        for use in self.uses:
            use.inputs = None
        self._first, self._joined, self.keep_inputs = None, None, False
