"""spectral: the polar factor against the singular value decomposition, and what bad input makes."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kbfgs_ext import environment, ops
from kbfgs_ext.ops import registry
from kbfgs_ext.ops.spectral import api
from kbfgs_ext.ops.spectral.reference import polar
from tests.helpers import backends, compare
from tests.helpers.backends import BOTH

ITERATIONS = len(api.COEFFICIENTS) // 3
SHAPES = [(1, 1), (1, 9), (9, 1), (7, 30), (30, 7), (33, 33), (100, 785), (130, 97)]
PRODUCTS, INVERSES = (api.COEFFICIENTS, None), (api.WEIGHTS, api.SHIFTS)
# How near to 1 singular values from `LEAST` to 1 come.
ACCURACY, LEAST = {PRODUCTS: 0.0126, INVERSES: 0.0996}, {PRODUCTS: 0.01, INVERSES: 0.005}
WAYS = pytest.mark.parametrize("way", [PRODUCTS, INVERSES], ids=["products", "inverses"])


def run(P, backend, way=PRODUCTS, ridge=0.0):
    """The polar factors of the list P; the work begins as NaN, which must not come through."""
    coefficients, shifts = way
    P = [p.clone() for p in P]
    work = [torch.full((api.workspace_size(*p.shape),), float("nan"), dtype=p.dtype) for p in P]
    ops.polar_(P, work, coefficients, ridge, shifts, backend)
    return P


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(n_g, n_a, values, seed=0):
    """A matrix with the given singular values, and its polar factor."""
    U = torch.linalg.qr(randn(n_g, len(values), seed=seed))[0]
    V = torch.linalg.qr(randn(n_a, len(values), seed=seed + 1))[0]
    return (U * values) @ V.T, U @ V.T


def on_values(values, way=PRODUCTS):
    """What (18) and (19) make of singular values in units of sqrt(norm)."""
    x, (coefficients, shifts) = values, way
    if shifts is not None:
        inverses = zip(coefficients[1:], shifts, strict=True)
        return x * (coefficients[0] + sum(w / (x * x + s) for w, s in inverses))
    for t in range(0, len(coefficients), 3):
        a, b, c = coefficients[t : t + 3]
        x = a * x + b * x**3 + c * x**5
    return x


def test_each_polynomial_is_the_best_on_what_the_ones_before_have_left():
    """Chebyshev's alternation: errors of one size at four places, of changing sign."""
    low, high = LEAST[PRODUCTS], 1.0
    for t in range(0, 3 * ITERATIONS, 3):
        a, b, c = api.COEFFICIENTS[t : t + 3]
        inner = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
        places = np.array([low, *inner, high])
        error = 1 - (a * places + b * places**3 + c * places**5)
        np.testing.assert_allclose(error, error[0] * np.array([1, -1, 1, -1]), rtol=1e-6)
        low, high = 1 - error[0], 1 + error[0]
    assert 1 - low <= ACCURACY[PRODUCTS]


def test_the_inverses_are_the_best_of_their_degree():
    """The same in six places: Zolotarev's function."""
    x = np.geomspace(LEAST[INVERSES], 1.0, 200_001)
    error = 1 - on_values(x, INVERSES)
    inner = error[1:-1]
    turns = (inner - error[:-2]) * (inner - error[2:]) > 0
    places = np.array([error[0], *inner[turns], error[-1]])
    np.testing.assert_allclose(places, error[0] * (-1.0) ** np.arange(6), rtol=1e-5)
    assert error[0] <= ACCURACY[INVERSES]


@WAYS
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_against_the_float64_reference(backend, way, dtype, ridge):
    P = [randn(*shape, seed=i).to(dtype) for i, shape in enumerate(SHAPES)]
    got, same = run(P, backend, way, ridge=ridge), run(P, "reference", way, ridge=ridge)
    truth = run([p.double() for p in P], "reference", way, ridge=ridge)
    # Roundings of G grow by what (18) does to small singular values, squared, whoever makes them.
    slope = 1e9 * on_values(1e-9, way)
    for p, s, t in zip(got, same, truth, strict=True):
        bound = compare.allowed(s, t, scale=slope)
        assert compare.error(p, t) <= bound, f"{tuple(p.shape)}: {compare.error(p, t)} > {bound}"


class Rounded(TorchDispatchMode):
    """Context in which products round their float32 operands to ``bits`` of mantissa."""

    def __init__(self, bits):
        super().__init__()
        self.spare = 23 - bits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            args = tuple(self.rounded(x) if getattr(x, "dim", int)() == 2 else x for x in args)
        return func(*args, **(kwargs or {}))

    def rounded(self, x):
        whole = x.contiguous().view(torch.int32)
        half = (1 << (self.spare - 1)) - 1 + ((whole >> self.spare) & 1)
        return ((whole + half) >> self.spare << self.spare).view(torch.float32)


SPECTRA = {
    "flat": lambda k: torch.ones(k),
    "random": lambda k: torch.linalg.svdvals(randn(k, 2 * k)),
    "1/i": lambda k: 1 / torch.arange(1, k + 1),
    "1/i^2": lambda k: 1 / torch.arange(1, k + 1) ** 2,
    "low rank": lambda k: torch.cat([torch.ones(20), torch.full((k - 20,), 1e-3)]),
    "exponential": lambda k: torch.logspace(0, -4, k),
}


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_what_tf32_makes_of_it(spectrum):
    """All products at the precision of TF32: a direction that is nearly the exact one."""
    k = 400
    P = with_spectrum(k, 2 * k, SPECTRA[spectrum](k).double())[0].float()
    exact = polar(P, api.COEFFICIENTS, 0.0)
    with Rounded(10):
        got = polar(P, api.COEFFICIENTS, 0.0)
    assert not torch.equal(got, exact)
    assert torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0) >= 0.997
    assert torch.linalg.svdvals(got)[0] <= 1.06


@pytest.mark.slow
def test_what_bf16_would_make_of_it():
    P = with_spectrum(400, 800, SPECTRA["1/i^2"](400).double())[0].float()
    exact = polar(P, api.COEFFICIENTS, 0.0)
    with Rounded(7):
        got = polar(P, api.COEFFICIENTS, 0.0)
    assert torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0) < 0.9
    assert torch.linalg.svdvals(got)[0] > 1.5


@WAYS
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_is_the_polar_factor(backend, way, shape):
    """Singular values from 1 to 1/20: all come out as 1, with their vectors as they were."""
    P, polar = with_spectrum(*shape, torch.logspace(0, -1.3, 40, dtype=torch.float64))
    (got,) = run([P], backend, way)
    assert torch.linalg.matrix_norm(got - polar, 2) <= ACCURACY[way] + 1e-9


@WAYS
@pytest.mark.parametrize("backend", BOTH)
def test_small_singular_values_stay_small_and_zeros_stay(backend, way):
    values = torch.tensor([1.0, 0.5, 1e-3, 1e-4, 0.0], dtype=torch.float64)
    P, _ = with_spectrum(5, 12, values)
    (got,) = run([P], backend, way)
    norm = values.pow(4).sum() ** 0.25
    wanted = on_values(values / norm, way)
    found = torch.linalg.svdvals(got)
    torch.testing.assert_close(found, wanted.sort(descending=True)[0], rtol=1e-6, atol=1e-9)
    assert found[-1] < 1e-9 and found[-2] < 0.024


@WAYS
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("ridge", [0.001, 0.01, 1.0])
def test_ridge_against_the_decomposition(backend, way, ridge):
    P, _ = with_spectrum(30, 50, torch.logspace(0, -6, 30, dtype=torch.float64))
    U, S, V = torch.linalg.svd(P, full_matrices=False)
    wanted = (U * (S / (S.square() + ridge * S.square().mean()).sqrt())) @ V
    (got,) = run([P], backend, way, ridge=ridge)
    spread = max(ACCURACY[way], 1 - on_values(min(LEAST[way], (ridge / 30) ** 0.5), way))
    assert torch.linalg.matrix_norm(got - wanted, 2) <= spread


@WAYS
@pytest.mark.parametrize("backend", BOTH)
def test_turns_with_its_argument(backend, way):
    P = randn(20, 35, seed=3)
    U, V = torch.linalg.qr(randn(20, 20))[0], torch.linalg.qr(randn(35, 35))[0]
    plain, turned, transposed = run([P, U @ P @ V, P.T.contiguous()], backend, way)
    torch.testing.assert_close(turned, U @ plain @ V, rtol=0, atol=1e-11)
    torch.testing.assert_close(transposed, plain.T, rtol=0, atol=1e-11)


@WAYS
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e37])
def test_scale_does_not_matter(backend, way, scale):
    P = randn(20, 30).float()
    plain, scaled = run([P, P * scale], backend, way)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-4)


@WAYS
@pytest.mark.parametrize("backend", BOTH)
def test_rank_one_zero_and_rows_of_zeros(backend, way):
    one = torch.outer(randn(6), randn(9, seed=1))
    dead = randn(6, 9)
    dead[2:4] = 0
    zero, rank_one, rest = run([torch.zeros(6, 9, dtype=torch.float64), one, dead], backend, way)
    assert torch.equal(zero, torch.zeros_like(zero))
    torch.testing.assert_close(rank_one, one / one.norm(), rtol=0, atol=ACCURACY[way])
    assert torch.equal(rest[2:4], torch.zeros_like(rest[2:4]))


@WAYS
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_layer_alone(backend, way, bad):
    P = [randn(8, 5), randn(8, 5)]
    P[0][3, 2] = bad
    spoilt, other = run(P, backend, way)
    assert spoilt.isnan().all()
    assert torch.equal(other, run(P[1:], backend, way)[0])


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_fewer_iterations_are_the_first_of_them(backend, iterations):
    P, _ = with_spectrum(10, 10, torch.linspace(1, 0.01, 10, dtype=torch.float64))
    way = api.COEFFICIENTS[: 3 * iterations], None
    (got,) = run([P], backend, way)
    S = torch.linalg.svdvals(P)
    wanted = on_values(S / S.pow(4).sum() ** 0.25, way).sort(descending=True)[0]
    torch.testing.assert_close(torch.linalg.svdvals(got), wanted, rtol=1e-9, atol=1e-9)


@WAYS
@pytest.mark.parametrize("backend", BOTH)
def test_layers_may_share_their_work(backend, way):
    P = [randn(9, 20), randn(12, 5)]
    shared = [p.clone() for p in P]
    pool = torch.empty(max(api.workspace_size(*p.shape) for p in P), dtype=torch.float64)
    ops.polar_(shared, [pool, pool], way[0], shifts=way[1], backend=backend)
    for s, alone in zip(shared, run(P, backend, way), strict=True):
        compare.assert_same_bits(s, alone)


def test_bad_arguments_are_named():
    P, work = [torch.ones(2, 3)], [torch.empty(api.workspace_size(2, 3))]
    with pytest.raises(ValueError, match=r"work\[0\] must be a vector of at least 1792 elements"):
        ops.polar_(P, [work[0][:20]], api.COEFFICIENTS)
    with pytest.raises(ValueError, match="coefficients must be triples, got 4 numbers"):
        ops.polar_(P, work, (1.0, 2.0, 3.0, 4.0))
    with pytest.raises(ValueError, match="ridge must be finite and at least 0, got -1"):
        ops.polar_(P, work, api.COEFFICIENTS, ridge=-1.0)
    with pytest.raises(ValueError, match=r"P\[0\] must be a matrix with entries"):
        ops.polar_([torch.ones(3)], work, api.COEFFICIENTS)
    with pytest.raises(ValueError, match=r"work\[0\] must be torch.float32 on cpu"):
        ops.polar_(P, [work[0].double()], api.COEFFICIENTS)
    with pytest.raises(ValueError, match="shifts must be 1 to 3 and .* coefficients, got 2 and 12"):
        ops.polar_(P, work, api.COEFFICIENTS, shifts=api.SHIFTS)
    with pytest.raises(ValueError, match="shifts must be 1 to 3 .*, got 4 and 5"):
        ops.polar_(P, work, (1.0,) * 5, shifts=(1.0,) * 4)
    with pytest.raises(ValueError, match="shifts must be finite and above 0, got .0.0,"):
        ops.polar_(P, work, (1.0, 1.0), shifts=(0.0,))


@backends.needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shifts", [1, 2, 3])
def test_inverses_on_all_instruction_sets_and_threads(dtype, shifts):
    """Sizes around those of blocks: of what is inverted entry by entry, and of the halves."""
    sizes = (16, 31, 32, 33, 63, 64, 65, 97, 130, 200)
    P = [randn(k, k + 3, seed=k).to(dtype) for k in sizes]
    way = (0.5, 0.02, 0.07, 0.4)[: shifts + 1], (1e-4, 4e-3, 0.1)[-shifts:]
    same, truth = run(P, "reference", way), run([p.double() for p in P], "reference", way)
    slope = 1e9 * on_values(1e-9, way)
    native = environment.native()
    for name in native.instruction_sets():  # the last is the one in use
        native.use_instruction_set(name)
        for count in (1, 2, 3):
            with backends.threads(count):
                got = run(P, "cpu", way)
            for p, s, t in zip(got, same, truth, strict=True):
                bound = compare.allowed(s, t, scale=slope)
                assert compare.error(p, t) <= bound, (name, count, len(p))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_inverses_are_not_for_gpu_kernels(backend):
    call = dict(P=[torch.ones(2, 3)], work=[torch.ones(2000)], ridge=0.0)
    call |= dict(coefficients=list(api.WEIGHTS), shifts=list(api.SHIFTS))
    implementation = registry.implementation("polar_", backend)
    if reason := implementation.unavailable():
        pytest.skip(reason)
    with pytest.raises(registry.Unsupported, match="make no inverses"):
        implementation.run(call)


@WAYS
@pytest.mark.parametrize("backend", BOTH)
def test_a_wide_spectrum_costs_no_accuracy(backend, way):
    P, _ = with_spectrum(200, 250, torch.logspace(0, -8, 200, dtype=torch.float64))
    P = P.float()
    (got,), (truth,) = run([P], backend, way), run([P.double()], "reference", way)
    assert torch.linalg.matrix_norm(got.double() - truth, 2) < 1e-3


@WAYS
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_only_singular_value_of_a_row(way, scale):
    row = scale * randn(1, 9)
    (P,) = run([row], "reference", way)
    torch.testing.assert_close(P, api.only_value(*way) * row / row.norm(), rtol=1e-12, atol=0)
