"""lbfgs_two_loop: recursion, compact form and the explicit matrix are one; the ring turns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbfgs_ext import ops
from tests.helpers import backends, compare
from tests.helpers.oracles import lbfgs_inverse, randn, spd

FORMS = ("recursion", "compact")


class Memory:
    """A ring of one layer, and the pairs that should be in it."""

    def __init__(self, p, n, dtype=torch.float64):
        self.S, self.Y = torch.zeros(2, p, n, dtype=dtype)
        self.rho = torch.zeros(p, dtype=dtype)
        self.pushed = torch.tensor(0)
        self.counts = torch.zeros(4, dtype=torch.int64)
        self.pairs = []

    def push(self, s, y, backend, c=None):
        c = torch.zeros_like(s) if c is None else c
        ops.lbfgs_push_(
            [self.S], [self.Y], [self.rho], [self.pushed], [self.counts], [s], [y], [c],
            backend=backend,
        )  # fmt: skip
        self.pairs = [*self.pairs, (s, y)][-len(self.S) :]

    def apply(self, Q, form, backend):
        out = torch.full_like(Q, float("nan"))
        ops.lbfgs_two_loop_(
            [out], [Q], [self.S], [self.Y], [self.rho], [self.pushed], form, backend
        )
        return out


def filled(p, n, count, seed, backend):
    memory = Memory(p, n)
    B = spd(n, 10.0, seed) * 10
    for k in range(count):
        s = randn(n, seed=seed + k + 1)
        s /= s.norm()
        memory.push(s, B @ s, backend)
    return memory


@pytest.mark.parametrize("backend", backends.BOTH)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 24),
    p=st.integers(1, 8),
    count=st.integers(0, 20),
    columns=st.sampled_from([None, 1, 3, 70]),
    seed=st.integers(0, 10_000),
)
def test_recursion_is_compact_is_explicit(backend, n, p, count, columns, seed):
    p = min(p, n)  # more pairs than dimensions: S Y' is singular, and the compact form not defined
    memory = filled(p, n, count, seed, backend)
    assert memory.pushed == count
    H = lbfgs_inverse(memory.pairs, n)
    Q = randn(n, seed=seed) if columns is None else randn(n, columns, seed=seed)
    scale = H.abs().max().item() * n * 10
    recursion = memory.apply(Q, "recursion", backend)
    compare.assert_equal_to(recursion, H @ Q, n + 8 * p, scale, "recursion")
    # R = triu(S Y') is solved with twice; its condition is what the compact form loses.
    R = torch.eye(1, dtype=torch.float64)
    if count:
        S, Y = (torch.stack(vectors) for vectors in zip(*memory.pairs, strict=True))
        R = torch.triu(S @ Y.T)
    condition = torch.linalg.cond(R).item()
    compact = memory.apply(Q, "compact", backend)
    compare.assert_equal_to(compact, H @ Q, n + 8 * p, scale * condition, "compact")


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize("form", FORMS)
def test_implied_factor_is_symmetric_positive_definite_and_secant(backend, form):
    memory = filled(6, 15, 9, 3, backend)
    H = memory.apply(torch.eye(15, dtype=torch.float64), form, backend)
    size = H.abs().max().item()
    compare.assert_equal_to(H, H.T, 15, size, "symmetry")
    assert torch.linalg.eigvalsh(H)[0] > 0
    s, y = memory.pairs[-1]
    compare.assert_equal_to(H @ y, s, 15, size * y.norm().item(), "secant equation")


@pytest.mark.parametrize("backend", backends.BOTH)
def test_ring_drops_the_oldest_pair(backend):
    memory = filled(3, 5, 4, 0, backend)
    newest, oldest = memory.pairs[-1], memory.pairs[0]
    compare.assert_same_bits(memory.S[0], newest[0])  # the fourth pair took the first row
    compare.assert_same_bits(memory.Y[1], oldest[1])
    assert memory.counts.tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("backend", backends.BOTH)
def test_rejected_pair_leaves_the_ring(backend):
    memory = filled(3, 5, 4, 0, backend)
    before = [t.clone() for t in (memory.S, memory.Y, memory.rho, memory.pushed)]
    s, y = randn(5, seed=9), randn(5, seed=10)
    memory.push(s, -s, backend)
    memory.push(s, s, backend, c=torch.full_like(s, 1e9))
    memory.push(s, y * float("nan"), backend)
    for got, wanted in zip((memory.S, memory.Y, memory.rho, memory.pushed), before, strict=True):
        compare.assert_same_bits(got, wanted)
    assert memory.counts.tolist() == [4, 3, 0, 0]


def test_bad_arguments_are_named():
    S, Q = torch.zeros(2, 3), torch.ones(3, 4)
    rho, pushed = torch.zeros(2), torch.tensor(0)
    with pytest.raises(ValueError, match="form must be one of"):
        ops.lbfgs_two_loop_([Q], [Q], [S], [S], [rho], [pushed], form="fast")
    with pytest.raises(ValueError, match=r"rho\[0\] must have shape \(2,\)"):
        ops.lbfgs_two_loop_([Q], [Q], [S], [S], [torch.zeros(3)], [pushed])
    with pytest.raises(ValueError, match=r"must be a vector or a matrix"):
        ops.lbfgs_two_loop_([Q], [torch.ones(3, 1, 1)], [S], [S], [rho], [pushed])
