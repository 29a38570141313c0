"""spectral's kernels, interpreted: the float64 reference is truth."""

import pytest
import torch

from kbfgs_ext.ops.spectral import api, reference, triton
from tests.helpers import compare

SHAPES = [(1, 5), (5, 1), (1, 1), (7, 30), (30, 7), (66, 66), (40, 150), (150, 66)]
SLOPE = 155.0  # of four iterations on small singular values: what rounding of G grows by


def work_of(P):
    return [torch.full((api.workspace_size(*p.shape),), float("nan"), dtype=p.dtype) for p in P]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("iterations", "ridge"), [(4, 0.0), (4, 0.01), (2, 0.0), (1, 0.1)])
def test_against_the_float64_reference(dtype, iterations, ridge):
    coefficients = api.COEFFICIENTS[: 3 * iterations]
    generator = torch.Generator().manual_seed(0)
    P = [torch.randn(shape, dtype=dtype, generator=generator) for shape in SHAPES]
    got = [p.clone() for p in P]
    triton.polar_(got, work_of(P), coefficients, ridge, None)
    for p, g in zip(P, got, strict=True):
        truth = reference.polar(p.double(), coefficients, ridge)
        same = reference.polar(p, coefficients, ridge)
        assert compare.error(g, truth) <= compare.allowed(same, truth, scale=SLOPE)


def test_zero_tiny_huge_and_not_finite():
    P = [torch.randn(20, 30) * scale for scale in (0.0, 1e-38, 1e37, 1.0, 1.0)]
    P[3][2, 3], P[4][2, 3] = float("nan"), float("inf")
    got = [p.clone() for p in P]
    triton.polar_(got, work_of(P), api.COEFFICIENTS, 0.0, None)
    assert torch.equal(got[0], torch.zeros_like(P[0]))
    for p, g in zip(P[1:3], got[1:3], strict=True):
        truth = reference.polar(p.double(), api.COEFFICIENTS, 0.0)
        torch.testing.assert_close(g.double(), truth, rtol=0, atol=1e-4)
    assert got[3].isnan().all() and got[4].isnan().all()


def test_layers_may_share_their_work():
    P = [torch.randn(9, 20), torch.randn(12, 5)]
    alone, shared = [p.clone() for p in P], [p.clone() for p in P]
    triton.polar_(alone, work_of(P), api.COEFFICIENTS, 0.0, None)
    pool = torch.empty(max(api.workspace_size(*p.shape) for p in P))
    triton.polar_(shared, [pool, pool], api.COEFFICIENTS, 0.0, None)
    for a, s in zip(alone, shared, strict=True):
        compare.assert_same_bits(s, a)
