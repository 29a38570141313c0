"""Every CUDA kernel, run on the host through its own bindings, against the float64 reference."""

import pytest
import torch

from kbfgs_ext.ops import registry
from kbfgs_ext.ops.registry import Unsupported
from tests.cuda_host.oncpu import check, run
from tests.helpers import calls, cases, compare, spectral_cases
from tests.helpers.cases import Case
from tests.ops import test_native_contract as contract

DTYPES = (torch.float32, torch.float64)
# What the shared case list leaves out: every boundary of packs, warps and tiles, in one call.
SIZES = (1, 2, 17, 32, 63, 127, 128, 129, 257)
PAIRS = [(n - 1 if n > 1 else 1, m) for n, m in zip(SIZES, reversed(SIZES), strict=True)]
MORE = [
    Case("curvature_update_", ":sizes", cases.curvature_update(PAIRS, "both")),
    Case("curvature_update_", ":sizes-no-bias", cases.curvature_update(PAIRS, "lm", bias=False)),
    Case("curvature_update_", ":sizes-X", cases.curvature_update(PAIRS, "both", 40, from_X=True)),
    Case("curvature_update_", ":70-layers", cases.curvature_update([(3, 2)] * 70, "both")),
    Case("bfgs_update_", ":70-layers", cases.bfgs_update((5,) * 70)),
    Case("double_damping_", ":70-layers", cases.double_damping((5,) * 70, "both")),
    Case("pair_ema_", ":70-layers", cases.pair_ema((5,) * 70)),
    Case("factor_ema_", ":70-layers", cases.factor_ema((5,) * 70, 9)),
    Case("factor_ema_", ":sizes", cases.factor_ema(SIZES, 33)),
    Case("hessian_action_", ":70-layers", cases.hessian_action((5,) * 70, 9)),
    Case("hessian_action_", ":sizes", cases.hessian_action(SIZES, 33)),
    Case("kron_step_", ":70-layers", cases.kron_step([(4, 3)] * 70)),
    Case("kron_step_", ":sizes", cases.kron_step(PAIRS)),
    Case("output_change_", ":70-layers", cases.output_change([(4, 30)] * 70)),
    Case("output_change_", ":sizes", cases.output_change(PAIRS)),
    Case("lbfgs_two_loop_", ":70-layers", cases.two_loop((5,) * 70, 3, 4, 6, "recursion")),
    Case("lbfgs_two_loop_", ":sizes", cases.two_loop(SIZES, 3, 4, 9, "recursion")),
    Case("lbfgs_two_loop_", ":1025", cases.two_loop((1025,), 3, 4, 3, "recursion")),
    Case("lbfgs_two_loop_", ":2049", cases.two_loop((2049,), 3, 4, 2, "recursion")),
    Case("lbfgs_two_loop_", ":2049-vector", cases.two_loop((2049,), 3, 4, None, "recursion")),
    Case("lbfgs_two_loop_", ":8193-compact", cases.two_loop((8193,), 2, 3, 2, "auto")),
    Case("restart_", ":70-layers", cases.restart((5,) * 70, "A")),
    Case("restart_", ":sizes", cases.restart(SIZES, "X", force=cases.YES)),
    Case("lbfgs_push_", ":70-layers", cases.push((5,) * 70, 3, 4)),
    Case("polar_", ":70-layers", cases.polar([(4, 3)] * 70)),
    Case("polar_", ":sizes", cases.polar(PAIRS)),
    Case("measure_inputs_", ":70-layers", cases.measure_inputs((2.0,) * 70)),
    Case("measure_pair_", ":70-layers", cases.measure_pair((5,) * 70)),
    Case("measure_pair_", ":sizes", cases.measure_pair(SIZES)),
    Case("lengths_", ":70", cases.lengths([(2.0, 3.0)] * 70, True)),
    Case("admit_", ":70", cases.admit(*[3] * 70)),
    Case("judge_", ":70", cases.judge(*["undone", "surge"] * 35)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*cases.ALL, *MORE], ids=str)
def test_as_accurate_as_the_reference(host, case, dtype):
    check(case, dtype)


CURVATURE = [c for c in [*cases.ALL, *MORE] if c.op == "curvature_update_"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CURVATURE, ids=str)
@pytest.mark.parametrize(
    ("multiprocessors", "shared_bytes"),
    [(1, 200 * 1024), (3, 5 * 1024), (7, 12 * 1024)],
    ids=["one-block", "nothing-on-chip", "some-on-chip"],
)
def test_curvature_update_on_other_machines(host, case, dtype, multiprocessors, shared_bytes):
    """However the rows fall on blocks, and whether they stay on chip or not."""
    host.set_machine(multiprocessors, shared_bytes, True)
    check(case, dtype)


@pytest.mark.parametrize("case", [*cases.ALL, *MORE], ids=str)
def test_same_bits_in_any_order_of_threads(host, case):
    """No result depends on which thread comes first: no missing barrier, no atomics."""
    args = case.build(torch.float32)
    forwards = run(case.op, args)
    host.set_machine(3, 200 * 1024, True)
    backwards = run(case.op, args)
    for (name, one), (_, other) in zip(
        calls.flat(case.op, forwards), calls.flat(case.op, backwards), strict=True
    ):
        if not name.startswith("work"):
            compare.assert_same_bits(one, other, name)


def shifted(tensor):
    """The same numbers one element off the allocation's start: on no 16-byte grid."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("op", sorted(registry.ops()))
def test_any_alignment(host, op):
    case = next((c for c in MORE if c.op == op and c.id == ":sizes"), cases.of(op)[-1])

    def run_shifted(name, args):
        moved = calls.apply(args, lambda t: t if t.dim() == 0 else shifted(t))
        registry.implementation(name, "cuda").run(moved)
        return moved

    check(case, torch.float32, run_shifted)


@pytest.mark.parametrize("kind", ["accepted", "both"])
def test_factors_stay_symmetric_to_the_last_bit(host, kind):
    args = cases.curvature_update(PAIRS, kind)(torch.float32)
    got = run("curvature_update_", args)
    for H, before in zip(got["H_a"] + got["H_g"], args["H_a"] + args["H_g"], strict=True):
        assert not torch.equal(H, before)
        compare.assert_same_bits(H, H.T.contiguous(), "symmetry")


FLAGGED = sorted(op for op in registry.ops() if "ok" in calls.names(op))
WRITTEN_WHEN_VOID = {  # as each op's api.py says
    "factor_ema_": ("a_bar",),
    "double_damping_": ("Hy",),
    "descend_": ("P",),
    "kron_step_": ("P", "work"),
    "curvature_update_": ("work",),
    "judge_": ("decision",),
}


@pytest.mark.parametrize("op", FLAGGED)
def test_void_step_leaves_every_bit(host, op):
    args = cases.first(op).build(torch.float32)
    args |= {name: torch.tensor(False) for name in args if name.startswith("ok")}
    got = run(op, args)
    for (name, g), (_, before) in zip(calls.flat(op, got), calls.flat(op, args), strict=True):
        if name.split("[")[0] not in WRITTEN_WHEN_VOID.get(op, ()):
            compare.assert_same_bits(g, before, name)


def spoilable(op):
    """Names of the op's lists of numbers in the case used for NaN and Inf."""
    args = _for_values(op).build(torch.float64)
    return [
        name for name, value in args.items()
        if isinstance(value, list) and value and value[-1].is_floating_point()
        and value[-1].numel() and not value[-1].isnan().all()
    ]  # fmt: skip


def _for_values(op):
    """A case whose arguments all matter: a ring without pairs would not read S and Y."""
    wanted = {"lbfgs_two_loop_": ":wrapped", "bfgs_update_": ":mixed"}.get(op)
    return next(case for case in cases.of(op) if wanted in (None, case.id))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in sorted(registry.ops()) for name in spoilable(op)]
)
def test_not_finite_argument_means_what_the_reference_says(host, op, name, value):
    args = _for_values(op).build(torch.float64)
    spoiled = args[name][0]
    spoiled.view(-1)[-1] = value
    got, wanted = run(op, args), calls.run(op, args, "reference")
    for (which, g), (_, w) in zip(
        calls.flat(op, got, True), calls.flat(op, wanted, True), strict=True
    ):
        if not which.startswith("work"):
            scale = w.double().nan_to_num(0, 0, 0).abs().max().item()
            if op == "polar_":
                scale = spectral_cases.slope(args["coefficients"])
            compare.assert_as_accurate(g, w, w, which, scale)


def test_what_the_kernels_do_not_take_is_declined_before_anything_is_written(host):
    for change, reason in (
        (lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, "float32 and float64"),
        (lambda t: t.float() if t.dtype == torch.float64 else t, "lam is float32"),
    ):
        args = calls.apply(cases.first("double_damping_").build(torch.float32), change)
        before = calls.apply(args, torch.clone)
        with pytest.raises(Unsupported, match=reason):
            registry.implementation("double_damping_", "cuda").run(args)
        for (name, g), (_, w) in zip(
            calls.flat("double_damping_", args), calls.flat("double_damping_", before), strict=True
        ):
            compare.assert_same_bits(g, w, name)
    H = torch.eye(3).repeat(1, 2)[:, ::2]
    v, counts = torch.ones(3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(Unsupported, match="H is not contiguous"):
        run("bfgs_update_", dict(H=[H], counts=[counts], s=[v], y=[v], Hy=[], c=[v], ok=None))


def test_layers_of_polar_that_share_their_work_are_declined(host):
    """Neighbours or not: all layers are worked on at once."""
    args = cases.polar([(3, 5), (2, 2), (4, 3)])(torch.float32)
    before = [p.clone() for p in args["P"]]
    args["work"][2] = args["work"][0] = torch.empty(2000)
    with pytest.raises(Unsupported, match="work is shared"):
        registry.implementation("polar_", "cuda").run(args)
    for p, b in zip(args["P"], before, strict=True):
        compare.assert_same_bits(p, b)
    assert host.launches() == []


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in sorted(registry.ops()) for name in contract.lists(op)]
)
def test_a_call_cannot_reach_past_a_tensor(host, op, name):
    for short in contract.shortened(op, name):
        before = calls.apply(short, calls.copy)
        with pytest.raises((ValueError, IndexError, Unsupported)):
            registry.implementation(op, "cuda").run(short)
        for (argument, g), (_, b) in zip(
            calls.flat(op, short), calls.flat(op, before), strict=True
        ):
            compare.assert_same_bits(g, b, argument)
    assert host.launches() == []


def test_empty_lists_do_nothing(host):
    for op in registry.ops():
        run(op, calls.empty(cases.first(op).build(torch.float32)))
    assert host.launches() == []
