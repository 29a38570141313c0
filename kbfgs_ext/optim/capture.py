"""Capture: what the two passes of a step leave behind, seen by forward hooks.

In the first pass each covered layer yields its input rows X, the mean row h_bar of its output and
the gradient sum g_bar; in the second pass h_bar_next and g_bar_next. A layer that is used several
times in one pass contributes the rows of all uses.

The gradient is caught by an identity in the graph, put right behind the layer's output. In the
second pass the weights want no gradient; that identity then also starts the graph, through an
anchor that does want one.
"""

from __future__ import annotations

import enum
import weakref

import torch
from torch import nn

from kbfgs_ext.optim.layers import Linear

WHY_NOT_COMPILED = (
    "K-BFGS notes each covered layer's input and output between graphs: torch.compile works, with"
    " a graph break per covered layer while training; use fullgraph=False (the default)"
)


class Pass(enum.Enum):
    """What the hooks do at present."""

    OFF = "off"
    WARM = "warm start"  # inputs alone
    FIRST = "first pass"
    SECOND = "second pass"


class Slot:
    """What one layer leaves behind in a step. Buffers are kept from step to step."""

    def __init__(self, name: str, kind: type[Linear], n_g: int) -> None:
        self.name = name
        self.kind = kind
        self.n_g = n_g
        self.keep_inputs = True  # whether the present pass needs X at all
        self.inputs: list[torch.Tensor] = []  # X of each use, m x d_in
        self.rows = 0  # m over all uses in the present pass
        self.gradients = 0  # uses that the backward pass has reached
        self.h = torch.empty(0)  # n_g: where the present pass averages the outputs
        self.g = torch.empty(0)  # n_g: where the present pass sums the gradients

    def begin(self, h: torch.Tensor, g: torch.Tensor, keep_inputs: bool) -> None:
        """Start a pass that writes to ``h`` and ``g``, and keeps X if ``keep_inputs``."""
        self.inputs, self.rows, self.gradients = [], 0, 0
        self.h, self.g, self.keep_inputs = h, g, keep_inputs

    def add_input(self, X: torch.Tensor) -> None:
        """One use's input rows."""
        self.inputs.append(X.detach())

    def add_output(self, h: torch.Tensor) -> None:
        """One use's output rows; they may be overwritten right after, so average them now."""
        rows = h.shape[0]
        if self.rows == 0:
            torch.mean(h, 0, dtype=self.h.dtype, out=self.h)
        else:
            share = rows / (self.rows + rows)
            self.h.mul_(1 - share).add_(h.mean(0, dtype=self.h.dtype), alpha=share)
        self.rows += rows

    def add_gradient(self, gradient: torch.Tensor) -> None:
        """One use's output gradient, summed over its rows."""
        rows = gradient.reshape(-1, self.n_g)
        if self.gradients == 0:
            torch.sum(rows, 0, dtype=self.g.dtype, out=self.g)
        else:
            self.g.add_(rows.sum(0, dtype=self.g.dtype))
        self.gradients += 1

    def X(self) -> torch.Tensor:
        """The input rows of all uses, m x d_in."""
        return self.inputs[0] if len(self.inputs) == 1 else torch.cat(self.inputs)


class _Identity(torch.autograd.Function):
    """Identity on a layer's output; its backward hands the gradient to the layer's slot.

    The output is marked as modified in place: a fresh tensor or a view would not survive an
    in-place activation behind the layer.
    """

    @staticmethod
    def forward(ctx, output, anchor, slot):
        ctx.slot = slot
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        with torch.no_grad():
            ctx.slot.add_gradient(gradient)
        return gradient, None, None


class Hook:
    """A module's forward hook. A copy of the module (deepcopy, pickle) carries a dead hook."""

    def __init__(self, recorder: Recorder | None, slot: Slot | None) -> None:
        self._recorder = weakref.ref(recorder) if recorder is not None else lambda: None
        self._slot = slot

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor):
        recorder = self._recorder()
        if recorder is None or self._slot is None or recorder.at is Pass.OFF:
            return None
        return recorder.record(self._slot, module, args[0] if args else kwargs["input"], output)

    def __deepcopy__(self, memo: dict) -> Hook:
        return Hook(None, None)

    def __reduce__(self) -> tuple:
        return Hook, (None, None)


class Recorder:
    """The hooks of a model's covered layers, and which pass they are in."""

    def __init__(self) -> None:
        self.at = Pass.OFF
        self.in_the_dark = False  # the present pass has run a layer without gradients
        self._anchor: torch.Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, module: nn.Module, slot: Slot) -> None:
        """Let ``module`` report to ``slot``."""
        self._handles.append(module.register_forward_hook(Hook(self, slot), with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.compiler.disable(reason=WHY_NOT_COMPILED)
    def record(self, slot: Slot, module: nn.Module, x: torch.Tensor, output: torch.Tensor):
        """Note one use of a layer; returns what the layer shall return instead, or None."""
        if x.numel() == 0:
            raise ValueError(
                f"the input of layer '{slot.name}' is empty: shape {tuple(x.shape)};"
                " a step needs a batch with at least one row"
            )
        if self.at is Pass.WARM:
            if slot.keep_inputs:
                slot.add_input(slot.kind.input_rows(module, x))
            return None
        if not torch.is_grad_enabled():
            self.in_the_dark = True
            return None  # a forward on the side, with no part in the loss
        with torch.no_grad():
            # A recomputation inside backward (activation checkpointing) is the same use again.
            if torch._C._current_graph_task_id() == -1:
                if slot.keep_inputs:
                    slot.add_input(slot.kind.input_rows(module, x))
                slot.add_output(slot.kind.output_rows(module, output.detach()))
        if self._anchor is None or self._anchor.device != output.device:
            self._anchor = torch.zeros((), device=output.device, requires_grad=True)
        return _Identity.apply(output, self._anchor, slot)
