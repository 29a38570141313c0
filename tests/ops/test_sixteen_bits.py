"""16-bit inputs, parameters and gradients beside 32-bit state, on the cpu backend."""

import pytest
import torch

from kbfgs_ext.ops import registry
from tests.helpers import backends, calls, cases, compare, half_cases
from tests.ops.test_native_cases import INSTRUCTION_SETS, instruction_set
from tests.ops.test_native_contract import BY_GEMM

pytestmark = backends.needs_native
__all__ = ["instruction_set"]  # a fixture
CASES = half_cases.variants(
    [*cases.ALL, cases.Case("kron_step_", ":long", cases.kron_step([(2100, 3), (5, 1030)]))]
)
# Those without sums over rows of X, which come in other blocks.
ELEMENTWISE = [op for op in half_cases.OPS if "X" not in calls.names(op)]
HALVES = pytest.mark.parametrize("half", half_cases.HALVES, ids=str)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_as_accurate_as_the_reference(case, instruction_set):
    args = case.build(torch.float32)
    truth = calls.run(case.op, calls.widened(args), "reference")
    reference = calls.run(case.op, args, "reference")
    got = calls.run(case.op, args, "cpu")
    compare.assert_call_as_accurate(case.op, got, reference, truth, args)


@HALVES
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_the_same_formula_on_the_widened_numbers(op, half):
    """Bit for bit what 32-bit numbers give, rounded to nearest where it is 16-bit again."""
    case = next(c for c in reversed(cases.of(op)) if half_cases.variants([c]))
    args = half_cases.narrow(case.build(torch.float32), half)
    wide = {
        name: [t.float() for t in value] if name in half_cases.NARROW else value
        for name, value in args.items()
    }
    got, wanted = (calls.run(op, given, "cpu") for given in (args, wide))
    for (name, g), (_, w) in zip(
        calls.flat(op, got, True), calls.flat(op, wanted, True), strict=True
    ):
        compare.assert_same_bits(g, w.to(g.dtype), name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@HALVES
@pytest.mark.parametrize("op", half_cases.OPS)
def test_not_finite_number_means_what_the_reference_says(op, half, value):
    case = next(c for c in cases.of(op) if half_cases.variants([c]))
    for name in half_cases.NARROW:
        args = half_cases.narrow(case.build(torch.float32), half)
        if not args.get(name):
            continue
        args[name][0].view(-1)[-1] = value
        got, reference = (calls.run(op, args, backend) for backend in ("cpu", "reference"))
        for (argument, g), (_, r) in zip(
            calls.flat(op, got, True), calls.flat(op, reference, True), strict=True
        ):
            if g.is_floating_point() and not argument.startswith("work"):
                assert torch.equal(g.isfinite(), r.isfinite()), (name, argument)
            elif not g.is_floating_point():
                assert torch.equal(g, r), (name, argument)


@HALVES
def test_undoing_a_step_restores_every_bit(half):
    """Any 16-bit number, denormal or infinite."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(half).view(256, 256)
    numbers = numbers.where(~numbers.isnan(), 1.0).clone()
    W, b = numbers[:, :-1].contiguous(), numbers[:, -1].contiguous()
    P, size, yes = torch.ones(256, 256), torch.tensor(0.5, dtype=torch.float64), torch.tensor(True)
    args = dict(W=[W.clone()], b=[b.clone()], P=[P])
    calls.call("descend_", args | dict(step_size=[size], ok=yes), "cpu")
    assert not torch.equal(args["W"][0], W)
    saved = dict(W=args["W"], b=args["b"], saved=args["P"], undo=yes)
    calls.call("restore_", saved, "cpu")
    compare.assert_same_bits(saved["W"][0], W)
    compare.assert_same_bits(saved["b"][0], b)


@pytest.mark.parametrize("op", half_cases.OPS)
def test_16_bit_numbers_beside_64_bit_state_are_refused(op):
    case = next(c for c in cases.of(op) if half_cases.variants([c]))
    args = half_cases.narrow(case.build(torch.float64), torch.bfloat16)
    with pytest.raises(registry.Unsupported, match="bfloat16, the cpu kernels take float64"):
        calls.run(op, args, "cpu")


@pytest.mark.parametrize("op", [op for op in half_cases.OPS if op not in BY_GEMM])
def test_thread_counts_agree(op):
    case = next(c for c in reversed(cases.of(op)) if half_cases.variants([c]))
    args = half_cases.narrow(case.build(torch.float32), torch.bfloat16)
    results = []
    for count in (1, 3):
        with backends.threads(count):
            results.append(calls.run(op, args, "cpu"))
    for (name, one), (_, more) in zip(
        *(calls.flat(op, result, True) for result in results), strict=True
    ):
        compare.assert_same_bits(one, more, name)


@HALVES
@pytest.mark.parametrize("op", half_cases.OPS)
def test_opcheck(op, half):
    case = next(c for c in cases.of(op) if half_cases.variants([c]))
    args = calls.apply(half_cases.narrow(case.build(torch.float32), half), calls.copy)
    torch.library.opcheck(getattr(torch.ops.kbfgs_ext, op).default, (), args | {"backend": "cpu"})
