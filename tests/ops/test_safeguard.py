"""safeguard: the judgement, case by case, on every backend that runs here; and what is refused."""

import math

import pytest
import torch

from kbfgs_ext import ops
from tests.helpers import backends, calls
from tests.helpers.safeguard_cases import JUDGED, SMALLEST, judge

# undo, order; the new scale over the old; stuck, seen, mean, lowest.
EXPECTED = {
    "first": (False, False, 1.0, (0, 1, 10, math.inf)),
    "short": (False, False, 1 / 1.1, (0, 5, 10, math.inf)),
    "uphill": (False, False, 1.1, (0, 8, 10.875, math.inf)),
    "rounding": (False, False, 1.1, (0, 8, 10.875, math.inf)),
    "undone": (True, False, 0.5, (0, 50, 10, 9)),
    "smallest": (True, False, 1.0, (2, 50, 10, 9)),
    "stuck": (True, True, 1.0, (0, 0, 0, math.inf)),
    "nothing": (True, False, 0.5, (0, 50, 10, 9)),
    "full": (False, False, 1.0, (0, 50, 9.96, 9.96)),
    "lower": (False, False, 1 / 0.97, (0, 50, 9.98, 9.98)),
    "surge": (False, True, 1.1, (0, 0, 0, math.inf)),
    "negative": (False, False, 1.1, (0, 50, -2.98, -9)),
    "enough": (False, False, 1.1, (0, 5, 10, math.inf)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", JUDGED)
@pytest.mark.parametrize("backend", backends.BOTH)
def test_judgement(backend, kind, dtype):
    args = judge(kind)(dtype)
    scale, watched, counts, decision, *_ = calls.run("judge_", args, backend)
    undo, order, factor, standing = EXPECTED[kind]
    assert decision[0].tolist() == [undo, order, order]
    assert counts[0].tolist() == [9, 1, 4 + undo, 1 + order]
    assert scale[0].item() == pytest.approx(factor * JUDGED[kind][0], rel=1e-6)
    assert SMALLEST <= scale[0] <= 1
    assert watched[0].tolist() == pytest.approx(standing, rel=1e-6)


@pytest.mark.parametrize("backend", backends.BOTH)
def test_an_order_stays_until_it_is_taken(backend):
    """And a void step gives none, whatever its losses."""
    args = judge("stuck", "enough", "surge", ordered=True, ok=torch.tensor(False))(torch.float64)
    decision = calls.run("judge_", args, backend)[3]
    assert [d.tolist() for d in decision] == [[False, False, True]] * 3
    args = judge("enough", ordered=True)(torch.float64)
    assert calls.run("judge_", args, backend)[3][0].tolist() == [False, False, True]


@pytest.mark.parametrize("backend", backends.BOTH)
def test_without_slope_any_decrease_is_enough_and_without_restarts_nothing_is_watched(backend):
    args = judge("short", sloped=False)(torch.float64)
    assert calls.run("judge_", args, backend)[0][0].item() == pytest.approx(0.55)
    args = judge("stuck", "surge", restart_after=None)(torch.float64)
    _, watched, _, decision, *_ = calls.run("judge_", args, backend)
    assert [d.tolist() for d in decision] == [[True, False, False], [False, False, False]]
    assert all(torch.equal(w, before) for w, before in zip(watched, args[1], strict=True))


@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        (0, [torch.ones(2)], r"scale\[0\] must have shape \(\), got \(2,\)"),
        (1, [torch.zeros(3)], r"watched\[0\] must have shape \(4,\), got \(3,\)"),
        (1, [torch.zeros(4).double()], r"watched\[0\] must be torch.float32 on cpu"),
        (2, [torch.zeros(4)], r"counts\[0\] must be torch.int64, got torch.float32"),
        (3, [torch.zeros(3)], r"decision\[0\] must be torch.bool, got torch.float32"),
        (4, [torch.ones(1)], r"loss\[0\] must have shape \(\), got \(1,\)"),
        (5, [], r"lists must have one entry per layer, got lengths"),
        (6, [torch.ones(()).double()], r"slope\[0\] must be torch.float32 on cpu"),
        (13, 0, "window must be at least 1, got 0"),
        (14, 0, "restart_after must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments(place, value, error):
    args = judge("enough")(torch.float32)
    args[place] = value
    with pytest.raises(ValueError, match=error):
        ops.judge_(*args)


def test_an_integer_scale_is_refused():
    args = judge("enough")(torch.float32)
    args[0] = [torch.ones((), dtype=torch.int64)]
    with pytest.raises(TypeError, match=r"scale\[0\] must be real floating point, got torch.int64"):
        ops.judge_(*args)
