"""The cpu backend on every case: accuracy, what it may not touch, and what it must leave alone."""

import pytest
import torch

from kbfgs_ext import environment
from kbfgs_ext.ops import registry
from tests.helpers import backends, calls, cases, compare

pytestmark = backends.needs_native
DTYPES = (torch.float32, torch.float64)


@pytest.fixture
def instruction_set(request):
    """Kernels compiled for one instruction set of this processor."""
    native = environment.native()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(native.instruction_sets()[-1])


INSTRUCTION_SETS = [] if environment.native_missing() else environment.native().instruction_sets()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.ALL, ids=cases.ids)
def test_as_accurate_as_the_reference(case, dtype, instruction_set):
    args = case.build(dtype)
    truth = calls.run(case.op, calls.widened(args), "reference")
    reference = calls.run(case.op, args, "reference")
    got = calls.run(case.op, args, "cpu")
    for (name, g), (_, r), (_, t), (_, before) in zip(
        *(calls.flat(case.op, side, True) for side in (got, reference, truth, args)), strict=True
    ):
        if name.startswith("work"):
            continue
        if case.op == "lbfgs_two_loop_":
            scale = max(t.abs().max().item(), args[1][0].abs().max().item())
        else:
            scale = compare.error(before, torch.zeros_like(before)) if g.is_floating_point() else 0
        compare.assert_as_accurate(g, r, t, name, scale)
    for (name, g), (_, before) in zip(
        calls.flat(case.op, got, False), calls.flat(case.op, args, False), strict=True
    ):
        compare.assert_same_bits(g, before, f"{name}, which is only read,")


def test_there_is_a_case_of_every_op():
    assert {case.op for case in cases.ALL} == set(registry.ops())
