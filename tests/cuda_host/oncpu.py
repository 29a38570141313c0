"""Running an op's cuda implementation on CPU tensors, past the check of the device."""

from __future__ import annotations

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
    compare.assert_call_as_accurate(case.op, got, wanted, truth, args)
