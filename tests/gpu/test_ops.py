"""Every op on cuda and triton against the float64 reference, and what an op owes the machine."""

import pytest
import torch

from kbfgs_ext.ops import registry
from tests.cuda_host.oncpu import check
from tests.cuda_host.test_kernels import MORE, PAIRS
from tests.gpu.ongpu import run, to_gpu
from tests.helpers import calls, cases, compare, half_cases

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float64)
OPS = sorted(registry.ops())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*cases.ALL, *MORE], ids=str)
def test_as_accurate_as_the_reference(backend, case, dtype):
    """Arguments that are only written are filled with NaN by the cases."""
    try:
        check(case, dtype, lambda op, args: run(op, args, backend))
    except registry.Unsupported as reason:
        assert "compact" in case.id or "2049" in case.id or "8193" in case.id, str(reason)  # noqa: PT017
        check(case, dtype, lambda op, args: run(op, args, "auto"))


@pytest.mark.parametrize("case", half_cases.variants([*cases.ALL, *MORE]), ids=str)
def test_16_bit_numbers_beside_32_bit_state(backend, case):
    check(case, torch.float32, lambda op, args: run(op, args, backend))


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_first_in_order(op):
    case = cases.first(op)
    args = case.build(torch.float32)
    first = registry.order(op, args)[0]
    assert first in ("cuda", "triton")
    for (name, a), (_, b) in zip(
        calls.flat(op, run(op, args, "auto"), True),
        calls.flat(op, run(op, args, first), True),
        strict=True,
    ):
        if not name.startswith("work"):
            compare.assert_same_bits(a, b, name)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, op):
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs it")
    args = to_gpu(cases.first(op).build(torch.float32))
    overload = getattr(torch.ops.kbfgs_ext, op).default
    args["backend"] = backend
    torch.library.opcheck(overload, (), args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", OPS)
def test_follows_the_current_stream(backend, op):
    """On a stream of its own, behind a long wait: an op on another stream would read NaN."""
    case = cases.first(op)
    args = case.build(torch.float32)
    wanted = run(op, args, backend)
    source = to_gpu(args)
    mine = calls.apply(
        source,
        lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t.clone(),
    )
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
        for (_, to), (_, value) in zip(calls.flat(op, mine), calls.flat(op, source), strict=True):
            to.copy_(value)
        calls.call(op, mine, backend)
    stream.synchronize()
    for (name, g), (_, w) in zip(
        calls.flat(op, mine, True), calls.flat(op, wanted, True), strict=True
    ):
        if not name.startswith("work"):
            compare.assert_same_bits(g.cpu(), w, name)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_every_time(backend, op):
    """No atomics on the way to a result."""
    case = next((c for c in MORE if c.op == op and c.id == ":sizes"), cases.first(op))
    args = case.build(torch.float32)
    first = run(op, args, backend)
    for _ in range(3):
        for (name, g), (_, w) in zip(
            calls.flat(op, run(op, args, backend), True), calls.flat(op, first, True), strict=True
        ):
            if not name.startswith("work"):
                compare.assert_same_bits(g, w, name)


@pytest.mark.parametrize("op", OPS)
def test_op_is_captured_by_a_graph(backend, op):
    """Captured once, replayed on new numbers in the same places."""
    args = cases.first(op).build(torch.float32)
    wanted = run(op, args, backend)
    source, mine = to_gpu(args), to_gpu(args)
    calls.call(op, mine, backend)  # compiles and allocates what the first call does
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls.call(op, mine, backend)
    for (_, to), (_, value) in zip(calls.flat(op, mine), calls.flat(op, source), strict=True):
        to.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for (name, g), (_, w) in zip(
        calls.flat(op, mine, True), calls.flat(op, wanted, True), strict=True
    ):
        if not name.startswith("work"):
            compare.assert_same_bits(g.cpu(), w, name)


def test_factors_stay_symmetric_to_the_last_bit(backend):
    for kind in ("accepted", "both"):
        got = run("curvature_update_", cases.curvature_update(PAIRS, kind)(torch.float32), backend)
        for H in got["H_a"] + got["H_g"]:
            compare.assert_same_bits(H, H.T.contiguous(), "symmetry")


@pytest.mark.parametrize("layers", [[(784, 1000)], [(2000, 1000), (625, 2000)]], ids=str)
@pytest.mark.parametrize("from_X", [False, True], ids=["A", "X"])
def test_curvature_update_at_the_papers_sizes(backend, layers, from_X):
    """On all multiprocessors; the larger does not stay on chip as a whole."""
    build = cases.curvature_update(layers, "both", 500, from_X=from_X)
    check(cases.Case("curvature_update_", "", build), torch.float32,
          lambda op, args: run(op, args, backend))  # fmt: skip
