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
    for (name, g), (_, r), (_, t), (_, before) in zip(
        *(calls.flat(case.op, side, True) for side in (got, wanted, truth, args)), strict=True
    ):
        if name.startswith("work"):
            continue
        compare.assert_as_accurate(g, r, t, name, cases.entered(case.op, args, before, t))
    for (name, g), (_, before) in zip(
        calls.flat(case.op, got, False), calls.flat(case.op, args, False), strict=True
    ):
        compare.assert_same_bits(g, before, f"{name}, which is only read,")
