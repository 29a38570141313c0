"""Launch configurations chosen by measurement: opt-in, ``KBFGS_AUTOTUNE=1``.

The first call of an op for given shapes then runs every candidate on copies of its arguments, so
that state is as it was, and later calls take the fastest. This waits for the device and needs the
arguments' memory twice, once; inside a graph capture nothing is measured. Without it an op takes
its first candidate, whose reasons stand beside it. Another tile adds in another order: results
differ by rounding between configurations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from kbfgs_ext import environment

Config = TypeVar("Config")
REPEATS = 5

_chosen: dict[tuple, Any] = {}


def choose(op: str, candidates: Sequence[Config], run: Callable[..., None], args: tuple) -> Config:
    """The configuration for ``run(config, *args)``, by shapes, dtypes and precision of products."""
    if not environment.autotune():
        return candidates[0]
    tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    device = tensors[0].device
    shapes = ((t.shape, t.dtype) for t in tensors)
    case = (op, device, environment.float32_matmul_precision(device), *shapes)
    if case not in _chosen:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return candidates[0]
        _chosen[case] = min(candidates, key=lambda config: _seconds(run, config, args, device))
    return _chosen[case]


def report() -> dict[str, list[Any]]:
    """What has been chosen so far, by op."""
    found: dict[str, list[Any]] = {}
    for (op, *_), config in _chosen.items():
        found.setdefault(op, []).append(config)
    return found


def _seconds(run: Callable[..., None], config: Any, args: tuple, device: torch.device) -> float:
    """Of one run on copies, the least of several; infinite where the device cannot hold it."""
    from triton.runtime.errors import OutOfResources

    from kbfgs_ext.ops.triton_launch import launches_into

    mine = tuple([t.clone() for t in arg] if isinstance(arg, list) else _copy(arg) for arg in args)
    best = float("inf")
    try:
        with launches_into(None):
            run(config, *mine)  # compiles
            for _ in range(REPEATS):
                _wait(device)
                start = time.perf_counter()
                run(config, *mine)
                _wait(device)
                best = min(best, time.perf_counter() - start)
    except OutOfResources:
        return float("inf")
    return best


def _copy(arg: Any) -> Any:
    return arg.clone() if isinstance(arg, torch.Tensor) else arg


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
