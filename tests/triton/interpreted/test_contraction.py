"""Fused multiply-adds: the interpreter makes none, a compiler does wherever it likes.

Here a product that goes into a sum is not rounded, as in the machine code. Of `a*b + c*d` one
product is rounded and the other is not, whichever the compiler chose, so both choices are tried.
"""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from tests.cuda_host.test_kernels import PAIRS
from tests.helpers import calls, cases, compare
from tests.triton.interpreted.test_cases import compared

CASES = [
    cases.Case("curvature_update_", ":both", cases.curvature_update(PAIRS[:3], "both")),
    cases.first("bfgs_update_"),
    cases.first("factor_ema_"),
]


@pytest.fixture(params=["left", "right"])
def fused(request, monkeypatch):
    """fp32 products of the ``side`` that is named go into sums and differences unrounded."""
    builder = interpreter.InterpreterBuilder
    made = []

    def product(self, a, b):
        handle = self.binary_op(a, b, np.multiply)
        if handle.data.dtype == np.float32:
            handle.exact = a.data.astype(np.float64) * b.data
        return handle

    def summed(op):
        def run(self, a, b):
            left, right = getattr(a, "exact", None), getattr(b, "exact", None)
            if left is None and right is None:
                return self.binary_op(a, b, op)
            made.append(op)
            if left is not None and (right is None or request.param == "left"):
                return interpreter.TensorHandle(op(left, b.data).astype(np.float32), a.dtype)
            return interpreter.TensorHandle(op(a.data, right).astype(np.float32), a.dtype)

        return run

    monkeypatch.setattr(builder, "create_fmul", product)
    monkeypatch.setattr(builder, "create_fadd", summed(np.add))
    monkeypatch.setattr(builder, "create_fsub", summed(np.subtract))
    yield
    assert made  # the builder still calls what is replaced here


@pytest.mark.parametrize("case", CASES, ids=str)
def test_factors_are_symmetric_to_the_last_bit(case, fused):
    args = case.build(torch.float32)
    got = calls.run(case.op, args, "triton")
    compared(case.op, args, got)
    for name, factor in calls.flat(case.op, got, True):
        if name.split("[")[0] in ("H", "H_a", "H_g", "A"):
            compare.assert_same_bits(factor, factor.T.contiguous(), name)
