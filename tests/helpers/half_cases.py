"""The cases with 16-bit numbers beside 32-bit state, as autocast and 16-bit parameters have."""

from __future__ import annotations

import torch

from tests.helpers import calls, cases
from tests.helpers.cases import Case

NARROW = ("X", "W", "b", "dW", "db")  # the arguments that may be 16-bit
HALVES = (torch.bfloat16, torch.float16)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
OPS = sorted({c.op for c in cases.ALL if any(c.build(torch.float32).get(name) for name in NARROW)})


def narrowed(tensor: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """The numbers rounded to ``half``, with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=half).copy_(tensor)


def narrow(args: calls.Args, half: torch.dtype, mixed: bool = False) -> calls.Args:
    """The call with 16-bit numbers: in all layers, or where ``mixed`` in turns."""

    def one(i: int, tensor: torch.Tensor) -> torch.Tensor:
        if mixed and i % 3 == 1:
            return tensor
        return narrowed(tensor, HALVES[i % 2] if mixed else half)

    return args | {
        name: [one(i, t) for i, t in enumerate(args[name])] for name in NARROW if args.get(name)
    }


def variant(case: Case, half: torch.dtype, mixed: bool = False) -> Case:
    """The case with 16-bit numbers; its builder takes float32 for the state."""
    name = "mixed" if mixed else NAMES[half]
    return Case(case.op, f"{case.id}-{name}", lambda dtype: narrow(case.build(dtype), half, mixed))


def master(case: Case, half: torch.dtype) -> Case:
    """The case with 16-bit gradients of 32-bit parameters: of a master copy of 16-bit ones."""

    def build(dtype: torch.dtype) -> calls.Args:
        args = case.build(dtype)
        return args | {name: [narrowed(t, half) for t in args[name]] for name in ("dW", "db")}

    return Case(case.op, f"{case.id}-master-{NAMES[half]}", build)


def variants(wanted: list[Case], mixed: bool = True) -> list[Case]:
    """All of ``wanted`` that have numbers to narrow, in both 16-bit types and, where they have
    several layers, in turns."""
    found = []
    for case in wanted:
        lists = [value for value in map(case.build(torch.float32).get, NARROW) if value]
        if lists:
            found += [variant(case, half) for half in HALVES]
            found += [master(case, half) for half in HALVES if "dW" in calls.names(case.op)]
            if mixed and len(lists[0]) > 1:
                found.append(variant(case, torch.bfloat16, mixed=True))
    return found
