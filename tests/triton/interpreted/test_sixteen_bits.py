"""16-bit inputs, parameters and gradients beside 32-bit state in Triton kernels, interpreted."""

import pytest
import torch

from kbfgs_ext.ops.registry import Unsupported
from tests.helpers import calls, cases, compare, half_cases
from tests.triton import recorder
from tests.triton.interpreted.test_cases import LARGE, compared

SMALL = [case for case in cases.ALL if not any(word in case.id for word in LARGE)]


def interpretable(case):
    """The interpreter multiplies the bits of bf16, so that of it only the sums can be tried."""
    return case.op != "factor_ema_" or case.id.endswith(("fp16", "mean-only-bf16"))


CASES = [case for case in half_cases.variants(SMALL) if interpretable(case)]


@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_as_accurate_as_the_reference(case):
    """State is fp32 all the same, and errors are fp32's but for the rounding of W and b."""
    args = case.build(torch.float32)
    compared(case.op, args, calls.run(case.op, args, "triton"))


def fp16_in_turns(op):
    """A call whose layers are fp16 and fp32 in turns."""
    case = next(c for c in cases.of(op) if half_cases.variants([c]))
    args = case.build(torch.float32)
    return args | {
        name: [half_cases.narrowed(t, torch.float16) if i % 2 else t for i, t in enumerate(value)]
        for name, value in args.items()
        if name in half_cases.NARROW and value
    }


@pytest.mark.parametrize("op", half_cases.OPS)
def test_layers_of_several_types_are_one_call(op):
    args = fp16_in_turns(op)
    compared(op, args, calls.run(op, args, "triton"))
    plain = next(c for c in cases.of(op) if half_cases.variants([c])).build(torch.float32)
    once = len(recorder.launches_of(op, calls.apply(plain, calls.copy)))
    of_state = 2 if op == "kron_step_" else 0  # its products: M and P are of one type
    found = recorder.launches_of(op, calls.apply(args, calls.copy))
    assert len(found) == 2 * once - of_state


@pytest.mark.parametrize("op", half_cases.OPS)
def test_a_group_that_is_declined_leaves_the_others_alone(op):
    args = fp16_in_turns(op)
    name = next(name for name in half_cases.NARROW if args.get(name))
    args[name][-1] = args[name][-1].to(torch.int32)
    before = calls.apply(args, calls.copy)
    with pytest.raises(Unsupported):
        calls.call(op, args, "triton")
    for (argument, g), (_, b) in zip(calls.flat(op, args), calls.flat(op, before), strict=True):
        compare.assert_same_bits(g, b, argument)
