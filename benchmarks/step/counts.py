"""What a step asks of the machine: ops, launches on a GPU, allocations. Counted in untimed steps.

==============  ==================================================================================
ops             calls that reach a kernel below autograd, backward's too, with what an op of ours
                calls inside, but for the extension's own matrix products, which no dispatcher
                sees; without views and empty tensors, which compute nothing. Of a graph's replay:
                what is called around it
launches        on a GPU: kernels, copies, fills and graphs that the CPU puts on it
allocations     how often torch's allocator is asked for memory on the device, and for how many
                bytes in all; memory given back in between counts anew
==============  ==================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kbfgs_ext.bench.clock import MEMORY, recorded
from kbfgs_ext.ops import library

LAUNCH = re.compile(r"cu(da)?(Graph)?Launch|cu(da)?Mem(cpy|set)")  # CUDA's calls, by their names


class OpCounter(TorchDispatchMode):
    """Context that counts ops."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # without gradients composite ops come whole: look inside
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self.count += computes(func)
        if func.namespace == "kbfgs_ext":
            with self:
                return library.KERNELS[func._opname](*args, **kwargs)
        return func(*args, **kwargs)


def computes(func: Any) -> bool:
    """Whether an op computes or writes; the profiler's are marks around an optimizer's step."""
    return not (func.is_view or "empty" in func._opname or func.namespace == "profiler")


def counts(step: Callable[[], object], period: int, device: torch.device) -> dict[str, float]:
    """Of ``step``, the mean over a period of them: ops, launches (GPU), allocations, bytes."""

    def steps() -> None:
        for _ in range(period):
            step()

    with OpCounter() as ops:
        steps()
    # In steps of their own: what is seen in passing is held, and autograd then copies it.
    events = recorded(steps, device)
    given = [
        event.nbytes()
        for event in events
        if event.name() == MEMORY and event.device_type().name.lower() == device.type
    ]
    asked = [size for size in given if size > 0]  # the others are given back
    found: dict[str, float] = {"ops": ops.count}
    if device.type == "cuda":
        found["launches"] = sum(bool(LAUNCH.match(event.name())) for event in events)
    found |= {"allocations": len(asked), "bytes": sum(asked)}
    return {name: total / period for name, total in found.items()}
