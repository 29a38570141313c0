"""The recorder: what a model's hooks report in a pass goes to the observers of its layers."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext.optim.capture import Observer, Pass
from kbfgs_ext.optim.compiled import uncompiled
from kbfgs_ext.optim.hooks import CallsByHand, GradientHook, ModuleHook
from kbfgs_ext.optim.layers import View

if TYPE_CHECKING:
    from kbfgs_ext.optim.process import Alone


def current_stream(device: torch.device) -> Any:
    """That of a GPU, else None."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def wait_for_autograd(device: torch.device) -> None:
    """Until its thread has let go of the last graph, which it may hold for a moment after
    `backward` has returned, nodes and all: it does before it goes through another."""
    with torch.enable_grad():
        torch.zeros((), device=device, requires_grad=True).square().backward()


Seen = list[tuple[Observer, View]]  # the layers that one call is of, by their places in its output


class Recorder:
    """The hooks of a model's covered layers, and which pass they are in; one ``process`` of many,
    or alone."""

    def __init__(self, process: Alone) -> None:
        self.at = Pass.OFF
        self.in_the_dark = False  # the present pass has run a layer without gradients
        self.closed = False
        self.process = process
        # Whose bias gradient a backward has filled, by its number: backwards may be nested.
        self._noted: dict[int, list[Observer]] = {}
        self._observers: list[Observer] = []
        self._stream: Any = None  # of the last pass, on a GPU
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._hooks: dict[int, ModuleHook] = {}  # by the module
        self._places: list[
            tuple[OrderedDict[int, Any], int]
        ] = []  # hooks of a module, and which is ours

    def attach(self, uses: list[tuple[nn.Module, View]], observer: Observer) -> None:
        """Let modules, with their views, and the bias report to ``observer``; before the hooks of
        others, which see the output as the layer has made it, virtual bias and all."""
        for module, view in uses:
            hook = self._hooks.get(id(module))
            if hook is None:
                hook = self._hooks[id(module)] = (CallsByHand if view.by_hand else ModuleHook)(self)
                *_, handle = handles = hook.register(module)
                self._handles += handles
                self._places.append((cast(Any, module._forward_hooks), handle.id))
            hook.seen.append((observer, view))
        self._observers.append(observer)
        observer.gradient_hook = GradientHook(self, observer)
        if observer.bias is not None:
            handle = observer.bias.register_post_accumulate_grad_hook(observer.gradient_hook)
            self._handles.append(handle)

    @property
    def live(self) -> bool:
        """Whether a pass is under way."""
        return self.at is not Pass.OFF

    @property
    def records_gradients(self) -> bool:
        """Whether it is one with a backward."""
        return self.at in (Pass.FIRST, Pass.SECOND)

    def begin(self, which: Pass) -> None:
        """The hooks do what ``which`` asks for. Ours come first again, where others have been put
        before them since."""
        for hooks, ours in self._places:
            if next(iter(hooks), ours) != ours and ours in hooks:
                hooks.move_to_end(ours, last=False)
        CallsByHand.forget(self)
        self._follow(current_stream(self._observers[0].weight.device))
        self.at, self.in_the_dark = which, False
        self._noted.clear()

    def _follow(self, stream: Any) -> None:
        """Passes are on ``stream`` now. Nodes that fill gradients belong to the stream they were
        made on: kept from an ordinary step they would draw its stream into a capture, which fails.
        """
        if stream == self._stream:
            return
        for observer in self._observers:
            observer.forget_accumulators()
        if self._stream is not None:
            wait_for_autograd(self._observers[0].weight.device)
        self._stream = stream

    def note_gradient(self, observer: Observer) -> None:
        """A backward pass has filled a bias's gradient. All of them are kept at its end, in one
        call, before the closure can clip or change them."""
        if not self.process.alone:  # DDP takes the gradient over next, and sums it at any time
            self._keep([observer])
        task = torch._C._current_graph_task_id()
        if task not in self._noted:
            self._noted[task] = []
            torch.autograd.Variable._execution_engine.queue_callback(
                functools.partial(self._keep_gradients, task)
            )
        self._noted[task].append(observer)

    @staticmethod
    def _keep(noted: list[Observer]) -> None:
        gradients = [g for one in noted if (g := one.gradient()) is not None]
        with torch.no_grad():
            torch._foreach_copy_([one.g_bar for one in noted], gradients)

    def _keep_gradients(self, task: int) -> None:
        noted = self._noted.pop(task, [])
        if self.process.alone:
            self._keep(noted)
        self.process.synced()
        for observer in noted:
            observer.filled = True

    def close(self) -> None:
        """Remove every hook, for good."""
        CallsByHand.forget(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._places.clear()
        self._hooks.clear()
        self.closed = True

    @uncompiled
    def record(self, seen: Seen, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        """Note one use of the layers that see ``x`` and make ``output`` side by side; returns what
        takes the output's place, or None."""
        wrapper = DDP._active_ddp_module
        if wrapper is not None and not any(wrapper is known for known in self.process.wrappers):
            self.process.meet(wrapper)
        observers = [observer for observer, _ in seen]
        if x.numel() == 0:
            for observer in observers:
                observer.empty = observer.empty or tuple(x.shape)
            return None
        if self.at is Pass.WARM:
            for observer, view in seen:
                if observer.keep_inputs:
                    observer.add(view.see(x, output)).reached = True
            return None
        if not torch.is_grad_enabled():
            self.in_the_dark = True  # a forward on the side, with no part in the loss
            for observer in observers:
                observer.dark = True
            return None
        replaced = with_virtual_bias(seen, output)
        if torch._C._current_graph_task_id() != -1:
            for observer in observers:
                observer.recomputed = True  # activation checkpointing: the same use again
            return replaced
        inside = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
        if inside:
            with torch.no_grad(), torch._C._DisableFuncTorch():
                uses = [(observer, observer.add(view.see(x, output))) for observer, view in seen]
        else:
            x, out = x.detach(), output.detach()
            uses = [(observer, observer.add(view.see(x, out))) for observer, view in seen]
        node = _origin(output if replaced is None else replaced)
        for observer, use in uses:
            if node is None or inside:
                use.reached = True  # nothing tells
            else:
                node.register_prehook(functools.partial(observer.reach, use))
        return replaced


def with_virtual_bias(seen: Seen, output: torch.Tensor) -> torch.Tensor | None:
    """``output`` plus the virtual biases of the layers; None where their own are trained."""
    biases = [observer.anchor() for observer, _ in seen]
    if all(bias is observer.bias for bias, (observer, _) in zip(biases, seen, strict=True)):
        return None
    bias = biases[0] if len(biases) == 1 else torch.cat(biases)
    bias = seen[0][1].spread(bias.to(output.dtype))
    if output.is_nested and output.layout is torch.strided:  # it takes no sum with a vector
        return torch.nested.as_nested_tensor([part + bias for part in output.unbind()])
    return output + bias


def _origin(output: torch.Tensor) -> Any:
    """The node of the graph that the output's gradient is sure to pass.

    An in-place activation on a view (of an output with more dimensions than two) rewrites the
    history of the view, and leaves its base's as it was.
    """
    base = output._base
    return output.grad_fn if base is None or base.grad_fn is None else base.grad_fn
