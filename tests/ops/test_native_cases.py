"""The cpu backend on every case: accuracy, what it may not touch, and what it must leave alone."""

import pytest
import torch

from kbfgs_ext.ops import registry
from tests.helpers import backends, cases, compare

pytestmark = backends.needs_native
DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.ALL, ids=cases.ids)
def test_as_accurate_as_the_reference(case, dtype):
    args = case.build(dtype)
    truth = cases.run(case.op, cases.widened(args), "reference")
    reference = cases.run(case.op, args, "reference")
    got = cases.run(case.op, args, "cpu")
    for (name, g), (_, r), (_, t), (_, before) in zip(
        *(cases.flat(case.op, side, True) for side in (got, reference, truth, args)), strict=True
    ):
        if name.startswith("work"):
            continue
        if case.op == "lbfgs_two_loop_":
            scale = max(t.abs().max().item(), args[1][0].abs().max().item())
        else:
            scale = compare.error(before, torch.zeros_like(before)) if g.is_floating_point() else 0
        compare.assert_as_accurate(g, r, t, name, scale)
    for (name, g), (_, before) in zip(
        cases.flat(case.op, got, False), cases.flat(case.op, args, False), strict=True
    ):
        compare.assert_same_bits(g, before, f"{name}, which is only read,")


def test_there_is_a_case_of_every_op():
    assert {case.op for case in cases.ALL} == set(registry.ops())
