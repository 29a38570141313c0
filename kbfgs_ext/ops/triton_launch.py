"""Launching Triton kernels: one at a time, or those of several groups of layers together."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from kbfgs_ext.ops.registry import Unsupported

# Said at every launch, because Triton's default goes from on to off with 3.10: `total += a * b` is
# one instruction with it, and rounds once. No result's symmetry hangs on it (see `store_both`).
COMPILER = {"enable_fp_fusion": True}

# Launches and what they read, while those of a call are collected.
_waiting: list[Any] | None = None


def launch(kernel, programs: int, *args, device: torch.device, **options) -> None:
    """Run ``programs`` programs of ``kernel`` on the tensors' device; none is no launch."""
    if programs == 0:
        return
    if _waiting is not None:
        options["device"] = device
        _waiting.append(functools.partial(launch, kernel, programs, *args, **options))
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](*args, **COMPILER, **options)


def keep(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same, kept until launches that are collected have run: those read them by address."""
    if _waiting is not None:
        _waiting.append(tensors)
    return tensors


@contextlib.contextmanager
def launches_into(waiting: list | None) -> Iterator[None]:
    """Context: launches are collected, or with None run at once."""
    global _waiting
    before, _waiting = _waiting, waiting
    try:
        yield
    finally:
        _waiting = before


def alike(*inputs: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of an op: layers whose ``inputs`` differ in dtype have launches of their own, since
    a kernel is compiled for one. None is launched before all of them are sure to be."""

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        names = tuple(inspect.signature(run).parameters)

        @functools.wraps(run)
        def split(*args, **kwargs) -> None:
            call = dict(zip(names, args, strict=False)) | kwargs
            given = [call[name] for name in inputs if call[name]]
            kinds = [_dtypes(layer) for layer in zip(*given, strict=True)]
            if len(set(kinds)) < 2:
                return run(**call)
            lists = {
                name: value for name, value in call.items() if isinstance(value, (list, tuple))
            }
            if any(value and len(value) != len(kinds) for value in lists.values()):
                raise Unsupported("Triton kernels take inputs of several dtypes with both sides")
            waiting: list = []
            with launches_into(waiting):
                for kind in dict.fromkeys(kinds):
                    mine = [i for i, other in enumerate(kinds) if other == kind]
                    part = {
                        name: [value[i] for i in mine] if value else value
                        for name, value in lists.items()
                    }
                    run(**call | part)
            for one in filter(callable, waiting):
                one()

        return split

    return decorate


def _dtypes(layer: Iterable[torch.Tensor]) -> tuple[torch.dtype, ...]:
    """Of a layer's inputs in turn; the empty place of a bias goes with the weight before it."""
    found: list[torch.dtype] = []
    for t in layer:
        found.append(t.dtype if t.numel() or not found else found[-1])
    return tuple(found)
