"""Running an op's cuda implementation on CPU tensors, past the check of the device."""

from __future__ import annotations

import torch

from kbfgs_ext.ops import registry
from tests.helpers import calls, cases, compare


def run(op: str, args: calls.Args) -> calls.Args:
    """The cuda implementation on copies of ``args``; returns them as it left them."""
    mine = calls.apply(args, calls.copy)
    registry.implementation(op, "cuda").run(mine)
    return mine


def check(case: cases.Case, dtype, run=run) -> None:
    """As accurate as the reference at ``dtype``, and nothing that is only read has changed."""
    args = case.build(dtype)
    truth = calls.run(case.op, calls.widened(args), "reference")
    wanted = calls.run(case.op, args, "reference")
    got = run(case.op, args)
    unseen = float64_error(case) if dtype is torch.float64 else None
    compare.assert_call_as_accurate(case.op, got, wanted, truth, args, unseen)


def float64_error(case: cases.Case) -> dict[str, float]:
    """What the reference in float64, which is the truth, may itself be off by: its error in
    float32, by the name of what it writes, in float64's roundings."""
    args = case.build(torch.float32)
    truth = calls.run(case.op, calls.widened(args), "reference")
    narrow = calls.run(case.op, args, "reference")
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    both = zip(calls.flat(case.op, narrow, True), calls.flat(case.op, truth, True), strict=True)
    return {
        name: finer * compare.error(n, t) for (name, n), (_, t) in both if n.is_floating_point()
    }
