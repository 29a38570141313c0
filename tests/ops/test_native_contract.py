"""What the cpu backend promises beside accuracy: void steps, refusals, NaN, threads, opcheck."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kbfgs_ext.ops import registry
from tests.helpers import backends, calls, cases, compare

pytestmark = backends.needs_native

# Written even where `ok` is false: each is said in the op's api.py.
WRITTEN_WHEN_VOID = {
    "factor_ema_": ("a_bar",),
    "double_damping_": ("Hy",),
    "descend_": ("P",),
    "kron_step_": ("P", "work"),
    "curvature_update_": ("work",),
    "judge_": ("decision",),
}
FLAGGED = sorted(op for op in registry.ops() if "ok" in calls.names(op))
BY_GEMM = ("factor_ema_", "lbfgs_two_loop_", "kron_precondition_", "kron_step_", "polar_")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", FLAGGED)
def test_void_step_leaves_every_bit(op, backend):
    args = cases.first(op).build(torch.float32)
    args |= {flag: torch.tensor(False) for flag in ("ok", "ok_pair") if flag in args}
    got = calls.run(op, args, backend)
    for (name, g), (_, before) in zip(calls.flat(op, got), calls.flat(op, args), strict=True):
        if name.split("[")[0] not in WRITTEN_WHEN_VOID.get(op, ()):
            compare.assert_same_bits(g, before, name)


def test_undo_false_leaves_every_bit():
    case = next(case for case in cases.of("restore_") if case.id == ":keep")
    args = case.build(torch.float64)
    got = calls.run("restore_", args, "cpu")
    for (name, g), (_, before) in zip(
        calls.flat("restore_", got), calls.flat("restore_", args), strict=True
    ):
        compare.assert_same_bits(g, before, name)


def floating_lists(op):
    """Names of the op's lists of floating-point tensors that it reads in its first case."""
    args = cases.first(op).build(torch.float64)
    return [
        name
        for name, value in args.items()
        if isinstance(value, list) and value and value[-1].is_floating_point()
        and value[-1].numel() and not value[-1].isnan().all()
    ]  # fmt: skip


def for_values(op):
    """A case whose arguments all matter: a ring without pairs would not read S and Y."""
    wanted = {"lbfgs_two_loop_": ":wrapped", "bfgs_update_": ":mixed"}.get(op)
    return next(case for case in cases.of(op) if wanted in (None, case.id))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in sorted(registry.ops()) for name in floating_lists(op)]
)
def test_not_finite_argument_means_what_the_reference_says(op, name, value):
    args = for_values(op).build(torch.float64)
    spoiled = args[name][0]
    spoiled.view(-1)[-1] = value  # the last entry of a symmetric matrix is on its diagonal
    got, reference = (calls.run(op, args, backend) for backend in ("cpu", "reference"))
    for (argument, g), (_, r) in zip(
        calls.flat(op, got, True), calls.flat(op, reference, True), strict=True
    ):
        if argument.startswith("work"):
            continue
        if g.is_floating_point():
            assert torch.equal(g.isfinite(), r.isfinite()), argument
        else:
            assert torch.equal(g, r), argument


def gapped(tensor):
    """The same numbers in storage with gaps."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    view = wide[..., ::2]
    view.copy_(tensor)
    return view


# The list that says how many layers there are.
LEADING = {
    "factor_ema_": "a_bar", "curvature_update_": "work", "kron_precondition_": "M",
    "descend_": "P", "restart_": "marks", "slope_": "saved", "restore_": "saved",
    "output_change_": "saved",
    "kron_step_": "M", "measure_inputs_": "norms", "measure_pair_": "g_bar", "lengths_": "norms",
    "admit_": "norms",
}  # fmt: skip
STATE = [
    ("factor_ema_", "A"), ("factor_ema_", "a_bar"), ("hessian_action_", "y"), ("pair_ema_", "s"),
    ("double_damping_", "H"), ("double_damping_", "y"), ("double_damping_", "counts"),
    ("bfgs_update_", "H"), ("curvature_update_", "H_a"), ("curvature_update_", "H_g"),
    ("curvature_update_", "A"), ("restart_", "H"), ("restart_", "A"), ("restart_", "marks"),
    ("lbfgs_two_loop_", "S"), ("lbfgs_two_loop_", "out"),
    ("lbfgs_push_", "Y"), ("kron_precondition_", "H_g"), ("kron_precondition_", "P"),
    ("momentum_", "M"), ("descend_", "W"), ("slope_", "slope"), ("restore_", "W"),
    ("output_change_", "change"),
    ("kron_step_", "W"),
    ("kron_step_", "H_a"), ("judge_", "watched"), ("judge_", "counts"), ("judge_", "decision"),
    ("polar_", "P"), ("polar_", "work"), ("admit_", "counts"), ("admit_", "decision"),
    ("lengths_", "sizes"), ("measure_pair_", "g_bar"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name"), STATE)
def test_strided_state_falls_through_to_the_reference(op, name):
    plain = cases.first(op).build(torch.float64)
    reference = calls.run(op, plain, "reference")
    value = plain[name]
    # Only the last layer is strided: the refusal must come before the first one is written.
    args = plain | {name: [*value[:-1], gapped(value[-1])]}
    before = calls.apply(args, calls.copy)
    with pytest.raises(registry.Unsupported, match="is not contiguous"):
        calls.call(op, args, "cpu")
    for (argument, g), (_, b) in zip(calls.flat(op, args), calls.flat(op, before), strict=True):
        compare.assert_same_bits(g, b, argument)

    calls.call(op, args, "auto")
    for (argument, g), (_, r) in zip(
        calls.flat(op, args, True), calls.flat(op, reference, True), strict=True
    ):
        compare.assert_same_bits(g, r, argument)


@pytest.mark.parametrize("op", sorted(registry.ops()))
def test_other_dtypes_are_refused(op):
    half = calls.apply(
        cases.first(op).build(torch.float32),
        lambda t: t.bfloat16() if t.dtype == torch.float32 else t,
    )
    with pytest.raises(registry.Unsupported, match="bfloat16"):
        calls.run(op, half, "cpu")


@pytest.mark.parametrize(
    ("op", "name"),
    [("factor_ema_", "X"), ("hessian_action_", "s"), ("kron_step_", "dW"), ("descend_", "b"),
     ("slope_", "dW"), ("output_change_", "W"), ("output_change_", "a_bar_next"),
     ("bfgs_update_", "c"), ("curvature_update_", "g_bar"), ("lbfgs_two_loop_", "rho"),
     ("descend_", "step_size"), ("double_damping_", "lam"), ("restart_", "A")],
)  # fmt: skip
def test_mixed_dtypes_are_refused(op, name):
    args = cases.first(op).build(torch.float32)
    value = args[name]
    other = [t.double() if t.dtype == torch.float32 else t.float() for t in value]
    args |= {name: other}
    before = calls.apply(args, calls.copy)
    with pytest.raises(registry.Unsupported, match="float"):
        calls.call(op, args, "cpu")
    for (argument, g), (_, b) in zip(calls.flat(op, args), calls.flat(op, before), strict=True):
        compare.assert_same_bits(g, b, argument)


def not_plain():
    """Tensors of three numbers, the last of one, that do not lie in memory as they are."""
    conjugate = torch.tensor([1 + 2j, 3 + 4j, 5 + 6j]).conj()
    yield "negated", conjugate.imag
    yield "sparse", torch.ones(3).to_sparse()
    yield "meta", torch.ones(3, device="meta")
    with FakeTensorMode():
        yield "fake", torch.ones(3)
    yield "negated scalar", conjugate[1].imag


@pytest.mark.filterwarnings("ignore:.*data pointer of FakeTensor")
@pytest.mark.parametrize(("kind", "tensor"), list(not_plain()))
def test_tensors_that_are_not_plain_are_refused(kind, tensor):
    """A step hands its tensors over past the dispatcher, which would make them plain."""
    ones = [torch.ones(tensor.numel())]
    call = dict(s=ones, y=ones, h_change=[tensor], g_bar=ones, g_bar_next=ones, decay=0.5, ok=None)
    with pytest.raises(registry.Unsupported, match="h_change is not a plain tensor"):
        registry.implementation("pair_ema_", "cpu").run(call)


def test_a_list_may_change_in_another_thread():
    """What a call needs is held by itself: the caller's lists may be emptied meanwhile."""
    n, stop = 200, threading.Event()
    H, c = torch.eye(n), torch.zeros(4, dtype=torch.int64)
    lists = {"H": [H], "counts": [c], "s": [torch.ones(n)], "y": [torch.ones(n)], "Hy": []}
    lists["c"] = lists["y"][:]

    def disturb():
        while not stop.is_set():
            for name in ("s", "y", "c"):
                lists[name][:] = [torch.ones(n)]

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(200):
            registry.implementation("bfgs_update_", "cpu").run(lists | {"ok": None})
    finally:
        stop.set()
        thread.join()
    assert H.isfinite().all()


@pytest.mark.parametrize("op", sorted(registry.ops()))
def test_empty_lists_return(op):
    calls.call(op, calls.empty(cases.first(op).build(torch.float32)), "cpu")


WIDEST = {
    "factor_ema_": ":sliced", "hessian_action_": ":513", "double_damping_": ":513",
    "bfgs_update_": ":513", "curvature_update_": ":wide-damped", "lbfgs_two_loop_": ":auto-513",
    "pair_ema_": ":1024", "kron_step_": ":wide-no-bias", "kron_precondition_": ":wide-no-bias",
    "momentum_": ":wide-no-bias", "descend_": ":wide-no-bias", "slope_": ":wide-no-bias",
    "output_change_": ":wide-no-bias",
    "restore_": ":undo-no-bias",
    "lbfgs_push_": ":wrapped", "restart_": ":1024", "judge_": ":all",
    "admit_": ":sound", "lengths_": ":shared-70", "measure_inputs_": ":all",
    "measure_pair_": ":1024-strided",
    "polar_": ":wide",
}  # fmt: skip


@pytest.mark.parametrize("op", sorted(registry.ops()))
def test_thread_counts_agree(op):
    case = next(case for case in cases.of(op) if case.id == WIDEST[op])
    args = case.build(torch.float32)
    results = []
    for count in (1, 2, 3):
        with backends.threads(count):
            results.append(calls.run(op, args, "cpu"))
    truth = calls.run(op, calls.widened(args), "reference")
    for other in results[1:]:
        for (name, one), (_, more), (_, true) in zip(
            *(calls.flat(op, side, True) for side in (results[0], other, truth)), strict=True
        ):
            if op not in BY_GEMM:  # partial sums depend on the shape alone
                compare.assert_same_bits(more, one, name)
            elif not name.startswith("work"):
                compare.assert_as_accurate(more, one, true, name)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", sorted(registry.ops()))
def test_opcheck(op, backend):
    args = calls.apply(cases.first(op).build(torch.float32), calls.copy)
    torch.library.opcheck(getattr(torch.ops.kbfgs_ext, op).default, (), args | {"backend": backend})


def test_the_extension_has_a_function_for_every_op():
    from kbfgs_ext import _C

    for op in registry.ops():
        assert callable(getattr(_C, f"{op}cpu"))
    assert isinstance(_C.has_cuda(), bool)


def test_unknown_instruction_set_is_named():
    from kbfgs_ext import _C

    with pytest.raises(ValueError, match="no instruction set mmx"):
        _C.use_instruction_set("mmx")


FREE = (("curvature_update_", "work"), ("admit_", "norms"))  # room to spare; as many as there are


def lists(op):
    """Names of the op's lists whose last tensor has entries to lose."""
    args = cases.first(op).build(torch.float32)
    return [
        name
        for name, value in args.items()
        if isinstance(value, list) and value and value[-1].dim() > 0
        and (op, name) not in FREE
    ]  # fmt: skip


def shortened(op, name):
    """Calls of the op with the list's last tensor an element too short, or left out."""
    args = cases.first(op).build(torch.float32)
    value = args[name]
    yield args | {name: [*value[:-1], value[-1].flatten()[:-1].clone()]}
    if name != LEADING.get(op, calls.names(op)[0]):
        yield args | {name: value[:-1]}


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in sorted(registry.ops()) for name in lists(op)]
)
def test_a_call_cannot_reach_past_a_tensor(op, name):
    """api.py checks shapes; the bare op must not read or write out of bounds either."""
    for short in shortened(op, name):
        before = calls.apply(short, calls.copy)
        with pytest.raises((ValueError, IndexError)):
            calls.call(op, short, "cpu")
        for (argument, g), (_, b) in zip(
            calls.flat(op, short), calls.flat(op, before), strict=True
        ):
            compare.assert_same_bits(g, b, argument)


def test_too_few_elements_are_said_by_name():
    v, c = torch.ones(3), torch.zeros(4, dtype=torch.int64)
    args = dict(H=[torch.eye(3)], counts=[c], s=[v], y=[v], Hy=[], c=[v[:2]])
    with pytest.raises(ValueError, match="c must have 3 elements, got 2"):
        calls.call("bfgs_update_", args, "cpu")
    args = dict(A=[torch.eye(3)], a_bar=[v.clone()], X=[torch.ones(5, 4)], decay=0.5)
    with pytest.raises(ValueError, match="X must have rows of 3 elements or one less"):
        calls.call("factor_ema_", args, "cpu")
