"""The cpu backend on every case: accuracy, what it may not touch, and what it must leave alone."""

import math

import pytest
import torch

from kbfgs_ext import environment, ops
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
    compare.assert_call_as_accurate(case.op, got, reference, truth, args)


def test_there_is_a_case_of_every_op():
    assert {case.op for case in cases.ALL} == set(registry.ops())


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_do_not_keep_denormal_numbers(dtype, instruction_set):
    """0.9 times the least of them rounds to itself, and products with it are slow for ever."""
    least = torch.finfo(dtype).tiny
    ends = torch.tensor([least / 2, -least / 2, least * 2, -least * 2, 0.0], dtype=dtype)
    expected = ends * torch.tensor([0.0, 0.0, 0.9, 0.9, 0.0], dtype=dtype)
    yes = torch.tensor(True)

    M = torch.cat([ends, ends.new_tensor([math.nan])])[:, None].repeat(1, 40)
    W, b = torch.ones(6, 39, dtype=dtype), torch.ones(6, dtype=dtype)
    ops.momentum_([M], [0 * W], [0 * b], [W], [b], 0.9, 0.0, yes, "cpu")
    for column in M[:5].T:  # in whole vectors, in what is left of the row, and the bias
        torch.testing.assert_close(column, expected, rtol=1e-6, atol=0)
    assert M[5].isnan().all()

    s, y, zero = ends.repeat(9), ends.repeat(9), torch.zeros(45, dtype=dtype)
    ops.pair_ema_([s], [y], [zero], [zero], [zero], 0.9, yes, "cpu")
    for pair in (s, y):
        torch.testing.assert_close(pair, expected.repeat(9), rtol=1e-6, atol=0)
