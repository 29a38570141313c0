"""double_damping: the two bounds hold afterwards, on both backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbfgs_ext import ops
from tests.helpers import backends, compare
from tests.helpers.oracles import randn, spd

MU1 = 0.2
POWELL, LM = 2, 3


def damped(backend, H, s, y, lam):
    """s, y, Hy, counts after both dampings of copies."""
    s, y = s.clone(), y.clone()
    Hy, counts = torch.full_like(y, float("nan")), torch.zeros(4, dtype=torch.int64)
    mu2 = torch.tensor(lam, dtype=torch.float64)
    ops.double_damping_([s], [y], [Hy], [counts], [H], [mu2], MU1, backend=backend)
    return s, y, Hy, counts


@pytest.mark.parametrize("backend", backends.BOTH)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    condition=st.sampled_from([1.0, 10.0, 1e4]),
    length=st.sampled_from([1e-3, 1.0, 1e3]),
    lam=st.sampled_from([0.05, 0.55, 0.95]),
)
def test_both_bounds_hold(backend, n, seed, condition, length, lam):
    H = spd(n, condition, seed)
    s, y = length * randn(n, seed=seed + 1), randn(n, seed=seed + 2)
    # (6) alone: a negligible mu2 never fires, once s'y is positive
    s1, y1, Hy, counts = damped(backend, H, s, y, 1e-300)
    assert counts[LM] == 0
    compare.assert_same_bits(y1, y, "y")
    loss = compare.rounding(torch.float64, n, (s1.norm() * y.norm()).item())
    assert s1 @ y >= MU1 * (y @ Hy) - loss
    s2, y2, Hy2, counts = damped(backend, H, s, y, lam)
    compare.assert_same_bits(s2, s1, "s")
    loss = compare.rounding(torch.float64, n, (s2.norm() * (y2.norm() + s2.norm())).item())
    assert s2 @ y2 >= lam * (s2 @ s2) - loss
    compare.assert_equal_to(Hy2, H @ y2, n, y2.norm().item(), "Hy")
    assert counts[POWELL] == int(not s @ y > MU1 * (y @ H @ y))


@pytest.mark.parametrize("backend", backends.BOTH)
def test_a_fine_pair_is_left_alone(backend):
    H, y = spd(9), randn(9, seed=1)
    s = 2 * H @ y
    got_s, got_y, Hy, counts = damped(backend, H, s, y, 1e-3)
    compare.assert_same_bits(got_s, s)
    compare.assert_same_bits(got_y, y)
    compare.assert_equal_to(Hy, H @ y, 9, y.norm().item())
    assert counts.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("backend", backends.BOTH)
def test_pair_is_an_average_of_changes(backend):
    s, y, *given = (randn(7, seed=k) for k in range(5))
    got_s, got_y = s.clone(), y.clone()
    ops.pair_ema_([got_s], [got_y], *([v] for v in given), 0.75, backend=backend)
    h_change, g_bar, g_bar_next = given
    compare.assert_equal_to(got_s, 0.75 * s + 0.25 * h_change, 3, 4.0)
    compare.assert_equal_to(got_y, 0.75 * y + 0.25 * (g_bar_next - g_bar), 3, 4.0)


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize("which", range(3))
def test_a_pair_that_is_not_finite_is_not_averaged(backend, which):
    s, y, *given = (randn(7, seed=k) for k in range(5))
    given[which][3] = float("inf")
    got_s, got_y = s.clone(), y.clone()
    ops.pair_ema_([got_s], [got_y], *([v] for v in given), 0.75, backend=backend)
    compare.assert_same_bits(got_s, s)
    compare.assert_same_bits(got_y, y)


def test_bad_arguments_are_named():
    v, lam = torch.ones(3), torch.tensor(1.0, dtype=torch.float64)
    counts = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"mu1 must be in \[0, 1\), got 1.0"):
        ops.double_damping_([v], [v], [v], [counts], [torch.eye(3)], [lam], 1.0)
    with pytest.raises(ValueError, match=r"H\[0\] must have shape \(3, 3\)"):
        ops.double_damping_([v], [v], [v], [counts], [torch.eye(4)], [lam])
    with pytest.raises(ValueError, match=r"g_bar\[0\] must have shape \(3,\)"):
        ops.pair_ema_([v], [v], [v], [torch.ones(2)], [v], 0.9)
