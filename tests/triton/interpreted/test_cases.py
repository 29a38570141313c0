"""The Triton kernels, interpreted, on every case: accuracy, and what they must leave alone."""

import math

import pytest
import torch
import triton.language as tl

from kbfgs_ext.ops import registry
from kbfgs_ext.ops.kron_precondition import triton as kron_precondition
from tests.helpers import calls, cases, compare

DTYPES = (torch.float32, torch.float64)


def compared(op, args, got):
    """Every written tensor as accurate as the reference, every other the same bit for bit."""
    truth = calls.run(op, calls.widened(args), "reference")
    reference = calls.run(op, args, "reference")
    for (name, g), (_, r), (_, t), (_, before) in zip(
        *(calls.flat(op, side, True) for side in (got, reference, truth, args)), strict=True
    ):
        if name.startswith("work"):
            continue
        scale = compare.entered(op, args, before, t)
        if g.dtype == torch.float64:
            # The truth is then the reference itself, and another order of summation already an
            # error: n terms of the result's size lose about sqrt(n) roundings.
            terms = max(g.shape, default=1)
            scale = math.sqrt(terms) * max(scale, compare.error(t, torch.zeros_like(t)))
        compare.assert_as_accurate(g, r, t, name, scale)
    for (name, g), (_, before) in zip(
        calls.flat(op, got, False), calls.flat(op, args, False), strict=True
    ):
        compare.assert_same_bits(g, before, f"{name}, which is only read,")


LARGE = ("513", "1024", "wide", "blocks")  # seconds each; in fp64 it would be the same code again
CALLS = [
    pytest.param(case, dtype, id=f"{case}-{dtype}")
    for case in cases.ALL
    for dtype in DTYPES
    if dtype == torch.float32 or not any(word in case.id for word in LARGE)
]


@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_as_accurate_as_the_reference(case, dtype):
    args = case.build(dtype)
    compared(case.op, args, calls.run(case.op, args, "triton"))


def test_there_is_a_kernel_of_every_op():
    for op in registry.ops():
        assert registry.available(op, "triton"), op


def test_rounded_operands_are_summed_in_fp32(monkeypatch):
    """With fp16 in bf16's place, whose bits the interpreter multiplies: the direction is right to
    the operands' rounding, and no better."""
    args = cases.first("kron_precondition_").build(torch.float32)
    exact = calls.flat("kron_precondition_", calls.run("kron_precondition_", args, "triton"), True)
    monkeypatch.setattr(kron_precondition, "operand_type", lambda *_: tl.float16)
    rounded = calls.flat(
        "kron_precondition_", calls.run("kron_precondition_", args, "triton"), True
    )
    errors = [
        ((r - e).norm() / e.norm()).item()
        for (name, r), (_, e) in zip(rounded, exact, strict=True)
        if name.startswith("P[") and e.numel() > 100
    ]
    assert errors
    assert all(2**-14 < error < 2**-9 for error in errors)


VOID = {
    "factor_ema_": ["A"],
    "pair_ema_": ["s", "y"],
    "double_damping_": ["s", "y", "counts"],
    "bfgs_update_": ["H", "counts"],
    "curvature_update_": ["H_a", "counts_a"],
    "lbfgs_push_": ["S", "Y", "rho", "pushed", "counts"],
    "momentum_": ["M"],
    "descend_": ["W", "b"],
    "kron_step_": ["W", "b", "M"],
    "judge_": ["scale", "watched", "counts"],
    "measure_inputs_": ["v", "lam_a"],
    "measure_pair_": ["ss", "yy", "g_bar", "g_bar_next"],
}


@pytest.mark.parametrize("op", VOID)
def test_void_call_leaves_every_bit(op):
    args = cases.first(op).build(torch.float32) | {"ok": torch.tensor(False)}
    got = calls.run(op, args, "triton")
    for name in VOID[op]:
        for g, before in zip(got[name], args[name], strict=True):
            compare.assert_same_bits(g, before, name)


def poisoned(op):
    """(argument, value) for every floating argument that the op reads."""
    return [
        (name, value)
        for name in calls.names(op)
        if name not in ("work", "a_bar" if op == "factor_ema_" else "", "out", "lam")
        for value in (float("nan"), float("inf"))
    ]


@pytest.mark.parametrize(
    "op",
    [
        "factor_ema_",
        "bfgs_update_",
        "curvature_update_",
        "restart_",
        "lbfgs_push_",
        "judge_",
        "admit_",
        "lengths_",
        "measure_inputs_",
        "measure_pair_",
    ],
)
def test_a_number_that_is_not_finite_does_what_it_does_in_the_reference(op):
    """The last layer is spoiled, argument by argument: decisions, and all other layers, agree."""
    for argument, value in poisoned(op):
        args = cases.first(op).build(torch.float64)
        if not isinstance(args[argument], list) or not args[argument]:
            continue
        spoiled = args[argument][-1]
        if not spoiled.is_floating_point() or spoiled.dim() == 0:
            continue
        if argument in ("A", "H"):  # symmetric, and so is what spoils it
            spoiled[len(spoiled) // 2, len(spoiled) // 2] = value
        else:
            spoiled.view(-1)[spoiled.numel() // 2] = value
        wanted, got = calls.run(op, args, "reference"), calls.run(op, args, "triton")
        for (name, g), (_, w) in zip(
            calls.flat(op, got, True), calls.flat(op, wanted, True), strict=True
        ):
            if not name.startswith("work"):
                scale = 100.0 if g.is_floating_point() else 0.0
                compare.assert_as_accurate(g, w, w, f"{name} after {argument} {value}", scale)


def test_average_that_overflows_keeps_the_old_pair():
    """Finite means whose difference is not: s and y stay, and the update goes on with them."""
    args = cases.of("curvature_update_")[0].build(torch.float32)
    for name, value in (("g_bar", -3e38), ("g_bar_next", 3e38)):
        args[name][0][0] = value
    compared("curvature_update_", args, calls.run("curvature_update_", args, "triton"))
