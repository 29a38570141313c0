"""The hooks that let observers see a pass: of modules' forwards, and of biases' gradients."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext.optim.capture import Observer, Pass
from kbfgs_ext.optim.compiled import uncompiled
from kbfgs_ext.optim.layers import View

if TYPE_CHECKING:
    from kbfgs_ext.optim.process import Alone


class Hook:
    """A module's forward hook. A copy of the module (deepcopy, pickle) carries a dead hook."""

    def __init__(self, recorder: Recorder | None, observer: Any, view: Any) -> None:
        self._recorder = weakref.ref(recorder) if recorder is not None else lambda: None
        self._observer, self._view = observer, view

    def __call__(self, module: nn.Module, args: tuple, *rest: Any):
        recorder = self._recorder()
        if recorder is None or recorder.at is Pass.OFF:
            return None  # rest is without kwargs where garbage collection has just removed the hook
        kwargs, output = rest
        x = args[0] if args else next(iter(kwargs.values()))
        replaced = recorder.record(self._observer, self._view, x, output)
        if replaced is not None and next(iter(module._forward_hooks.values())) is not self:
            raise RuntimeError(
                f"a hook that the closure has put before ours (prepend=True) on layer"
                f" '{self._observer.name}' may change its output: register it before the step"
            )
        return replaced

    def __deepcopy__(self, memo: dict) -> Hook:
        return Hook(None, None, None)

    def __reduce__(self) -> tuple:
        return Hook, (None, None, None)


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
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._places: list[
            tuple[OrderedDict[int, Any], int]
        ] = []  # hooks of a module, and which is ours

    def attach(self, uses: list[tuple[nn.Module, View]], observer: Observer) -> None:
        """Let modules, with their views, and the bias report to ``observer``; before the hooks of
        others, which see the output as the layer has made it, virtual bias and all."""
        for module, view in uses:
            hook = Hook(self, observer, view)
            handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
            self._handles.append(handle)
            self._places.append((cast(Any, module._forward_hooks), handle.id))
        observer.gradient_hook = GradientHook(self, observer)
        if observer.bias is not None:
            handle = observer.bias.register_post_accumulate_grad_hook(observer.gradient_hook)
            self._handles.append(handle)

    def begin(self, which: Pass) -> None:
        """The hooks do what ``which`` asks for. Ours come first again, where others have been put
        before them since."""
        for hooks, ours in self._places:
            if next(iter(hooks), ours) != ours and ours in hooks:
                hooks.move_to_end(ours, last=False)
        self.at, self.in_the_dark = which, False
        self._noted.clear()

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
        gradients = [g for one in noted if (g := one.anchor().grad) is not None]
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
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._places.clear()
        self.closed = True

    @uncompiled
    def record(self, observer: Observer, view: View, x: torch.Tensor, output: torch.Tensor):
        """Note one use of a layer; returns what the layer shall return instead, or None."""
        wrapper = DDP._active_ddp_module
        if wrapper is not None and not any(wrapper is known for known in self.process.wrappers):
            self.process.meet(wrapper)
        if x.numel() == 0:
            observer.empty = observer.empty or tuple(x.shape)
            return None
        if self.at is Pass.WARM:
            if observer.keep_inputs:
                observer.add(view.inputs(x)).reached = True
            return None
        if not torch.is_grad_enabled():
            self.in_the_dark = observer.dark = True
            return None  # a forward on the side, with no part in the loss
        replaced = observer.with_virtual_bias(output)
        if torch._C._current_graph_task_id() != -1:
            observer.recomputed = True  # activation checkpointing: the same use again
            return replaced
        inside = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
        if inside:
            with torch.no_grad(), torch._C._DisableFuncTorch():
                use = observer.add(view.inputs(x))
        else:
            use = observer.add(view.inputs(x.detach()))
        node = _origin(output if replaced is None else replaced)
        if node is None or inside:
            use.reached = True  # nothing tells
        else:
            node.register_prehook(functools.partial(observer.reach, use))
        return replaced


def _origin(output: torch.Tensor) -> Any:
    """The node of the graph that the output's gradient is sure to pass.

    An in-place activation on a view (of an output with more dimensions than two) rewrites the
    history of the view, and leaves its base's as it was.
    """
    base = output._base
    return output.grad_fn if base is None or base.grad_fn is None else base.grad_fn


class GradientHook:
    """The hook of a bias's gradient, real or virtual."""

    def __init__(self, recorder: Recorder, observer: Observer) -> None:
        self._recorder, self._observer = weakref.ref(recorder), weakref.ref(observer)

    def __call__(self, bias: torch.Tensor) -> None:
        recorder, observer = self._recorder(), self._observer()
        if recorder is None or observer is None or bias is not observer.anchor():
            return
        if recorder.at in (Pass.FIRST, Pass.SECOND):
            recorder.note_gradient(observer)
