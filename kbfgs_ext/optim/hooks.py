"""The hooks that a recorder puts into a model. A copy of it (deepcopy, pickle) carries dead ones.

============== =====================================================================
`ModuleHook`   sees what a module is given and returns
`CallsByHand`  sees the calls of `F.linear` inside a module, which uses its weights so
`GradientHook` sees the gradient of a bias, real or virtual
============== =====================================================================
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from kbfgs_ext.optim.compiled import uncompiled
from kbfgs_ext.optim.layers import views

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from kbfgs_ext.optim.capture import Observer
    from kbfgs_ext.optim.layers import View
    from kbfgs_ext.optim.recorder import Recorder, Seen


class ModuleHook:
    """A module's forward hook; ``seen`` are its layers."""

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = weakref.ref(recorder) if recorder is not None else lambda: None
        self.seen: Seen = []

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        """Before the hooks of others, which see the output as the layer has made it, virtual bias
        and all."""
        return [module.register_forward_hook(self, with_kwargs=True, prepend=True)]

    @property
    def recorder(self) -> Recorder | None:
        """The recorder, if it is there and in a pass."""
        recorder = self._recorder()
        return recorder if recorder is not None and recorder.live else None

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        recorder = self.recorder
        if recorder is None:
            return None  # rest is without kwargs where garbage collection has just removed the hook
        kwargs, output = rest
        x = args[0] if args else next(iter(kwargs.values()))
        replaced = recorder.record(self.seen, x, output)
        if replaced is not None and next(iter(module._forward_hooks.values())) is not self:
            raise RuntimeError(
                f"a hook that the closure has put before ours (prepend=True) on layer"
                f" '{self.seen[0][0].name}' may change its output: register it before the step"
            )
        return replaced

    def __deepcopy__(self, memo: dict) -> ModuleHook:
        return type(self)(None)

    def __reduce__(self) -> tuple:
        return type(self), (None,)


class CallsByHand(ModuleHook):
    """A module that hands its weights to `F.linear` itself, as `nn.MultiheadAttention` does: while
    it runs in a pass, `F.linear` is one that looks for them."""

    running: ClassVar[list[CallsByHand]] = []  # innermost last
    plain: ClassVar[Any] = F.linear  # torch's own
    attention: ClassVar[Any] = F.multi_head_attention_forward  # torch's own, which calls that
    fast: ClassVar[bool] = True  # whether torch's fused attention, which does not, was on

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        before = module.register_forward_pre_hook(_Enter(self), with_kwargs=True)
        after = module.register_forward_hook(self, with_kwargs=True, prepend=True, always_call=True)
        return [before, after]

    @uncompiled
    def enter(self, module: nn.Module) -> None:
        """The module begins."""
        if self.recorder is not None:
            if any(observer.sharded for observer, _ in self.seen):  # it runs with other tensors
                whole = {view.name: view for view in views(module)}
                self.seen = [(observer, whole[view.name]) for observer, view in self.seen]
            if not self.running:
                self._replace()
            self.running.append(self)

    @uncompiled
    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        """The module ends, or has failed."""
        if self.running and self.running[-1] is self:
            self.running.pop()
            if not self.running:
                self._restore()

    @classmethod
    def forget(cls, recorder: Recorder) -> None:
        """No module of ``recorder`` runs: an interrupt, or a hook taken away, may have left one."""
        if cls.running:
            cls.running[:] = [one for one in cls.running if one._recorder() is not recorder]
            if not cls.running:
                cls._restore()

    @staticmethod
    def _replace() -> None:
        cls = CallsByHand
        cls.plain, cls.attention = F.linear, F.multi_head_attention_forward
        cls.fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        F.linear, F.multi_head_attention_forward = _linear, _attention

    @staticmethod
    def _restore() -> None:
        cls = CallsByHand
        F.linear, F.multi_head_attention_forward = cls.plain, cls.attention
        torch.backends.mha.set_fastpath_enabled(cls.fast)

    def record(self, x: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> Any:
        """One call of `F.linear` inside: with a weight of ours, or with some rows of it."""
        recorder = self.recorder
        layers = [] if recorder is None else [one for one in self.seen if _is_in(weight, one[1])]
        return recorder.record(layers, x, output) if recorder is not None and layers else None


class _Enter:
    """The pre-hook that belongs to a `CallsByHand`."""

    def __init__(self, hook: CallsByHand) -> None:
        self._hook = hook

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._hook.enter(module)


@uncompiled
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """`F.linear`, seen by the innermost module that runs."""
    output = CallsByHand.plain(x, weight, bias)
    replaced = CallsByHand.running[-1].record(x, weight, output) if CallsByHand.running else None
    return output if replaced is None else replaced


@uncompiled
def _attention(*args: Any, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward`, which torch.compile would take for one op."""
    return CallsByHand.attention(*args, **kwargs)


def _is_in(weight: torch.Tensor, view: View) -> bool:
    """Whether the matrix of ``view`` is among the rows that ``weight`` has of its parameter."""
    whole: torch.Tensor = view.weight
    if weight is whole:
        return True
    if weight._base is not whole or weight.dim() != 2 or view.rows is None:
        return False
    first = (weight.storage_offset() - whole.storage_offset()) // whole.shape[1]
    return first <= view.rows.start and view.rows.stop <= first + len(weight)


class GradientHook:
    """The hook of a bias's gradient, real or virtual."""

    def __init__(self, recorder: Recorder, observer: Observer) -> None:
        self._recorder, self._observer = weakref.ref(recorder), weakref.ref(observer)

    def __call__(self, bias: torch.Tensor) -> None:
        recorder, observer = self._recorder(), self._observer()
        if recorder is None or observer is None or bias is not observer.anchor():
            return
        if recorder.records_gradients:
            recorder.note_gradient(observer)
