"""safeguard: admission and judgement, case by case, on every backend that runs here; refusals."""

import math

import pytest
import torch

from kbfgs_ext import ops
from tests.helpers import backends, calls
from tests.helpers.safeguard_cases import JUDGED, SMALLEST, admit, judge

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
    "zero": (True, False, 0.5, (0, 5, 8, math.inf)),
    "bottomless": (True, False, 0.5, (0, 5, 10, math.inf)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", JUDGED)
@pytest.mark.parametrize("backend", backends.BOTH)
def test_judgement(backend, kind, dtype):
    args = judge(kind)(dtype)
    got = calls.run("judge_", args, backend)
    (scale,), (watched,), (counts,), (decision,) = (
        got[name] for name in ("scale", "watched", "counts", "decision")
    )
    undo, order, factor, standing = EXPECTED[kind]
    sound = math.isfinite(JUDGED[kind][3])
    assert decision.tolist() == [undo, order, order, sound, False]
    assert counts.tolist() == [9, 1, 4 + undo, 1 + order]
    assert scale.item() == pytest.approx(factor * JUDGED[kind][0], rel=1e-6)
    assert SMALLEST <= scale <= 1
    assert watched.tolist() == pytest.approx(standing, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", backends.BOTH)
def test_any_rise_is_kept_where_the_noise_is_infinite(backend, dtype):
    """From a loss of 0 too; a loss that is not finite is undone all the same."""
    kinds = ("zero", "undone", "negative", "nothing", "bottomless")
    args = judge(*kinds, sloped=False, noise=math.inf)(dtype)
    decision = calls.run("judge_", args, backend)["decision"]
    assert [bool(d[0]) for d in decision] == [False, False, False, True, True]


@pytest.mark.parametrize("backend", backends.BOTH)
def test_an_order_stays_until_it_is_taken(backend):
    """And a void step gives none, whatever its losses."""
    args = judge("stuck", "enough", "surge", ordered=True, ok=torch.tensor(False))(torch.float64)
    decision = calls.run("judge_", args, backend)["decision"]
    assert [d.tolist() for d in decision] == [[False, False, True, False, False]] * 3
    args = judge("enough", ordered=True)(torch.float64)
    (decision,) = calls.run("judge_", args, backend)["decision"]
    assert decision.tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("backend", backends.BOTH)
def test_an_order_is_taken_where_the_activations_come_late(backend):
    args = judge("enough", "stuck", ordered=True, take=True)(torch.float64)
    decision = calls.run("judge_", args, backend)["decision"]
    assert [d.tolist()[1:] for d in decision] == [
        [False, False, True, True], [True, False, True, True]
    ]  # fmt: skip
    args = judge("enough", ordered=True, take=True, ok=torch.tensor(False))(torch.float64)
    (decision,) = calls.run("judge_", args, backend)["decision"]
    assert decision.tolist() == [False, False, True, False, False]  # it waits


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize("take", [True, False])
@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_admission(backend, take, value):
    args = admit(3, 300, value=value, take=take, ordered=True)(torch.float32)
    got = calls.run("admit_", args, backend)
    sound = math.isfinite(value)
    assert [s.item() for s in got["sound"]] == [sound] * 2
    assert [c.tolist() for c in got["counts"]] == [[10, 1 + (not sound), 4, 1]] * 2
    taken = take and sound
    wanted = [True, False, not taken, True, taken]
    assert [d.tolist() for d in got["decision"]] == [wanted] * 2
    args = admit(3, loss=value)(torch.float64)
    assert calls.run("admit_", args, backend)["sound"][0].item() == sound


@pytest.mark.parametrize("backend", backends.BOTH)
def test_without_slope_any_decrease_is_enough_and_without_restarts_nothing_is_watched(backend):
    args = judge("short", sloped=False)(torch.float64)
    assert calls.run("judge_", args, backend)["scale"][0].item() == pytest.approx(0.55)
    args = judge("stuck", "surge", restart_after=None)(torch.float64)
    got = calls.run("judge_", args, backend)
    assert [d.tolist()[:3] for d in got["decision"]] == [[True, False, False], [False] * 3]
    assert all(map(torch.equal, got["watched"], args["watched"]))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("scale", [torch.ones(2)], r"scale\[0\] must have shape \(\), got \(2,\)"),
        ("watched", [torch.zeros(3)], r"watched\[0\] must have shape \(4,\), got \(3,\)"),
        ("watched", [torch.zeros(4).double()], r"watched\[0\] must be torch.float32 on cpu"),
        ("counts", [torch.zeros(4)], r"counts\[0\] must be torch.int64, got torch.float32"),
        ("decision", [torch.zeros(3)], r"decision\[0\] must be torch.bool, got torch.float32"),
        ("loss", [torch.ones(1)], r"loss\[0\] must have shape \(\), got \(1,\)"),
        ("loss_next", [], r"lists must have one entry per layer, got lengths"),
        ("slope", [torch.ones(()).double()], r"slope\[0\] must be torch.float32 on cpu"),
        ("window", 0, "window must be at least 1, got 0"),
        ("restart_after", 0, "restart_after must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments(name, value, error):
    args = judge("enough")(torch.float32)
    args[name] = value
    with pytest.raises(ValueError, match=error):
        ops.judge_(**args)


def test_an_integer_scale_is_refused():
    args = judge("enough")(torch.float32)
    args["scale"] = [torch.ones((), dtype=torch.int64)]
    with pytest.raises(TypeError, match=r"scale\[0\] must be real floating point, got torch.int64"):
        ops.judge_(**args)
