"""16-bit inputs, parameters and gradients beside 32-bit state, in the CUDA kernels on the host."""

import pytest
import torch

from kbfgs_ext.ops import registry
from tests.cuda_host.oncpu import check, run
from tests.cuda_host.test_kernels import MORE, shifted
from tests.helpers import calls, cases, compare, half_cases

CASES = half_cases.variants([*cases.ALL, *MORE])


def any_of(op):
    """A call of every boundary of packs, warps and tiles where there is one."""
    found = half_cases.variants([c for c in MORE if c.op == op], mixed=False)
    return found or half_cases.variants(cases.of(op), mixed=False)


@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_as_accurate_as_the_reference(host, case):
    check(case, torch.float32)


@pytest.mark.parametrize("op", half_cases.OPS)
def test_any_alignment(host, op):
    def run_shifted(name, args):
        moved = calls.apply(args, lambda t: t if t.dim() == 0 else shifted(t))
        registry.implementation(name, "cuda").run(moved)
        return moved

    for case in any_of(op)[-2:]:
        check(case, torch.float32, run_shifted)


@pytest.mark.parametrize("op", half_cases.OPS)
def test_same_bits_in_any_order_of_threads(host, op):
    args = any_of(op)[-1].build(torch.float32)
    forwards = run(op, args)
    host.set_machine(3, 200 * 1024, True)
    backwards = run(op, args)
    for (name, one), (_, other) in zip(
        calls.flat(op, forwards), calls.flat(op, backwards), strict=True
    ):
        if not name.startswith("work"):
            compare.assert_same_bits(one, other, name)


@pytest.mark.parametrize("op", half_cases.OPS)
def test_layers_of_several_types_share_their_launches(host, op):
    plain = next(c for c in cases.of(op) if half_cases.variants([c])).build(torch.float32)
    counts = []
    for args in (plain, half_cases.narrow(plain, torch.bfloat16, mixed=True)):
        host.set_machine(3, 200 * 1024, False)
        run(op, args)
        counts.append(len(host.launches()))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("op", half_cases.OPS)
def test_not_finite_number_means_what_the_reference_says(host, op, value):
    case = next(c for c in cases.of(op) if half_cases.variants([c]))
    for name in half_cases.NARROW:
        args = half_cases.narrow(case.build(torch.float32), torch.float16)
        if not args.get(name):
            continue
        args[name][0].view(-1)[-1] = value
        got, wanted = run(op, args), calls.run(op, args, "reference")
        for (argument, g), (_, w) in zip(
            calls.flat(op, got, True), calls.flat(op, wanted, True), strict=True
        ):
            if g.is_floating_point() and not argument.startswith("work"):
                assert torch.equal(g.isfinite(), w.isfinite()), (name, argument)


def test_layers_whose_own_types_differ_are_declined(host):
    args = cases.first("momentum_").build(torch.float32)
    args["db"] = [t.bfloat16() for t in args["db"]]
    before = calls.apply(args, calls.copy)
    with pytest.raises(registry.Unsupported, match="b in the dtype of W, and db in that of dW"):
        registry.implementation("momentum_", "cuda").run(args)
    for (name, g), (_, b) in zip(
        calls.flat("momentum_", args), calls.flat("momentum_", before), strict=True
    ):
        compare.assert_same_bits(g, b, name)


@pytest.mark.parametrize("half", half_cases.HALVES, ids=str)
def test_undoing_a_step_restores_every_bit(host, half):
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(half).view(256, 256)
    numbers = numbers.where(~numbers.isnan(), 1.0).clone()
    W, b = numbers[:, :-1].contiguous(), numbers[:, -1].contiguous()
    size, yes = torch.tensor(0.5, dtype=torch.float64), torch.tensor(True)
    args = dict(W=[W], b=[b], P=[torch.ones(256, 256)], step_size=[size], ok=yes)
    stepped = run("descend_", args)
    back = run("restore_", dict(W=stepped["W"], b=stepped["b"], saved=stepped["P"], undo=yes))
    assert not torch.equal(stepped["W"][0], W)
    compare.assert_same_bits(back["W"][0], W)
    compare.assert_same_bits(back["b"][0], b)
