"""Calling any op by its schema: its arguments in order, without ``backend``.

`run` calls the op on copies and hands back the arguments as it left them; `flat` names the tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kbfgs_ext.ops import library as library


def schema(op: str) -> list[torch.Argument]:
    """The op's arguments without ``backend``."""
    return list(getattr(torch.ops.kbfgs_ext, op).default._schema.arguments)[:-1]


def written(op: str) -> list[bool]:
    """Which arguments the op writes."""
    return [a.alias_info is not None and a.alias_info.is_write for a in schema(op)]


def apply(args: list, change: Callable[[torch.Tensor], torch.Tensor]) -> list:
    """The arguments with every tensor changed."""
    out = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            out.append(change(arg))
        elif isinstance(arg, list):
            out.append([change(t) for t in arg])
        else:
            out.append(arg)
    return out


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, gaps included."""
    if tensor.is_contiguous():
        return tensor.clone()
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return out.copy_(tensor)


def widened(args: list) -> list:
    """The same numbers in float64: the input of the truth."""
    return apply(args, lambda t: t.double() if t.is_floating_point() else t.clone())


def run(op: str, args: list, backend: str) -> list:
    """The op on copies of ``args``; returns them as it left them."""
    mine = apply(args, copy)
    getattr(torch.ops.kbfgs_ext, op)(*mine, backend)
    return mine


def flat(op: str, args: list, only_written: bool | None = None) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of all tensors; or of those written; or of those only read."""
    found = []
    for argument, is_written, value in zip(schema(op), written(op), args, strict=True):
        if only_written is not None and is_written != only_written:
            continue
        if isinstance(value, torch.Tensor):
            found.append((argument.name, value))
        elif isinstance(value, list):
            found += [(f"{argument.name}[{i}]", t) for i, t in enumerate(value)]
    return found
