"""A CUDA graph's stand-in on the CPU: the ops of one run, to be run again on the same tensors.

As with a graph, Python runs once, at the capture. Every number that it hands to an op, and every
tensor that an op was given, stays what it was then; the capture itself changes no tensor, and
reading a value in it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class Tape(TorchDispatchMode):
    """Has the interface of `kbfgs_ext.optim.graph.Graph`."""

    def __init__(self, run: Callable[[], torch.Tensor], stream: Any) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, Any]] = []
        # Every tensor as an op first found it: not all ops own up to what they write (BatchNorm).
        self._found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        try:
            with self:
                self.result = run()
        finally:
            with torch.no_grad():
                for tensor, value in reversed(self._found.values()):  # views share memory
                    tensor.copy_(value)
            self._found.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(f"{func} reads a value: a capture cannot")
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor) and id(t) not in self._found:
                self._found[id(t)] = (t, t.clone())
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self._calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
