"""Calling any op: its arguments are a dict by name, without ``backend``.

`run` calls the op on copies and hands back the arguments as it left them; `flat` names the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kbfgs_ext.ops import registry

Args = dict[str, Any]


def names(op: str) -> tuple[str, ...]:
    """The op's arguments in order, without ``backend``."""
    return registry.declaration(op).arguments[:-1]


def written(op: str) -> set[str]:
    """The arguments that the op writes."""
    schema = getattr(torch.ops.kbfgs_ext, op).default._schema
    return {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """An argument with its tensors changed."""
    if isinstance(value, list):
        return [change(t) for t in value]
    return change(value) if isinstance(value, torch.Tensor) else value


def apply(args: Args, change: Callable[[torch.Tensor], torch.Tensor]) -> Args:
    """The arguments with every tensor changed."""
    return {name: changed(value, change) for name, value in args.items()}


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, gaps included."""
    if tensor.is_contiguous():
        return tensor.clone()
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return out.copy_(tensor)


def widened(args: Args) -> Args:
    """The same numbers in float64: the input of the truth."""
    return apply(args, lambda t: t.double() if t.is_floating_point() else t.clone())


def empty(args: Args) -> Args:
    """The call without layers."""
    return {name: [] if isinstance(value, list) else value for name, value in args.items()}


def call(op: str, args: Args, backend: str) -> None:
    """The op itself, without the checks of its public function."""
    getattr(torch.ops.kbfgs_ext, op)(**args, backend=backend)


def run(op: str, args: Args, backend: str) -> Args:
    """The op on copies of ``args``; returns them as it left them."""
    mine = apply(args, copy)
    call(op, mine, backend)
    return mine


def flat(op: str, args: Args, only_written: bool | None = None) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of all tensors; or of those written; or of those only read."""
    found, outputs = [], written(op)
    for name, value in args.items():
        if only_written is not None and (name in outputs) != only_written:
            continue
        if isinstance(value, torch.Tensor):
            found.append((name, value))
        elif isinstance(value, list):
            found += [(f"{name}[{i}]", t) for i, t in enumerate(value)]
    return found
