"""factor_ema against the dense formula, on both backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbfgs_ext import ops
from tests.helpers import backends, compare
from tests.helpers.oracles import randn, spd, with_ones

SMALL = dict(max_examples=25, deadline=None)
sizes = st.integers(1, 40)
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("backend", backends.BOTH)
@settings(**SMALL)
@given(n=sizes, m=sizes, bias=st.booleans(), decay=st.floats(0, 0.99), seed=seeds)
def test_average_of_the_outer_products(backend, n, m, bias, decay, seed):
    X = randn(m, n, seed=seed)
    X_t = with_ones(X) if bias else X
    A = spd(n + bias, seed=seed)
    got, a_bar = A.clone(), torch.empty(n + bias, dtype=torch.float64)
    ops.factor_ema_([got], [a_bar], [X], decay, backend=backend)
    wanted = decay * A + (1 - decay) * sum(torch.outer(x, x) for x in X_t) / m
    scale = X_t.square().max().item() + 1
    compare.assert_equal_to(got, wanted, m, scale, "A")
    compare.assert_equal_to(a_bar, X_t.mean(0), m, scale, "a_bar")
    if bias:
        assert a_bar[-1] == 1


@pytest.mark.parametrize("n", [1, 17, 63, 200])
@backends.needs_native
def test_factor_stays_exactly_symmetric_and_positive(n):
    A = [torch.eye(n + 1)]
    a_bar = [torch.empty(n + 1)]
    for k in range(5):
        ops.factor_ema_(A, a_bar, [randn(n // 2 + 1, n, seed=k).float()], 0.5, backend="cpu")
        compare.assert_same_bits(A[0], A[0].T.contiguous(), "A")
    lowest = torch.linalg.eigvalsh(A[0].double())[0]
    assert lowest > 0.5**5 / 2  # what is left of the identity, short of rounding


@pytest.mark.parametrize("backend", backends.BOTH)
@settings(**SMALL)
@given(n=sizes, m=sizes, bias=st.booleans(), seed=seeds)
def test_hessian_action_is_the_action_of_the_factor(backend, n, m, bias, seed):
    X, s = randn(m, n, seed=seed), randn(n + bias, seed=seed + 1)
    lam = torch.tensor(0.3, dtype=torch.float64)
    A, a_bar = torch.zeros(n + bias, n + bias, dtype=torch.float64), torch.empty_like(s)
    ops.factor_ema_([A], [a_bar], [X], 0.0, backend=backend)
    y = torch.full_like(s, float("nan"))
    ops.hessian_action_([y], [X], [s], [lam], backend=backend)
    scale = (X.abs().max().item() + 1) ** 2 * s.abs().sum().item()
    compare.assert_equal_to(y, A @ s + lam * s, m + n, scale, "y")


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_layer_with_a_bad_row_keeps_its_factor(backend, value):
    X = [randn(5, 3, seed=0), randn(5, 3, seed=1)]
    X[0][2, 1] = value  # 1e200: finite, but its square is not
    A = [spd(4), spd(4)]
    before = [a.clone() for a in A]
    ops.factor_ema_(A, [torch.empty(4, dtype=torch.float64) for _ in A], X, 0.9, backend=backend)
    compare.assert_same_bits(A[0], before[0])
    assert not torch.equal(A[1], before[1])
    assert A[1].isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.factor_ema_([], [torch.ones(4)], [torch.ones(2, 6)], 0.9),
            r"X\[0\] must be m x 4",
        ),
        (lambda: ops.factor_ema_([], [torch.ones(4)], [torch.ones(0, 3)], 0.9), r"with m > 0"),
        (lambda: ops.factor_ema_([], [torch.ones(4)], [torch.ones(2, 3)], 1.0), r"decay must be"),
        (lambda: ops.factor_ema_([], [torch.ones(4)], [], 0.9), "one entry per layer"),
        (
            lambda: ops.hessian_action_(
                [torch.ones(3)], [torch.ones(2, 4)], [torch.ones(4)], [torch.tensor(1.0)]
            ),
            r"y\[0\] must have shape \(4,\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
