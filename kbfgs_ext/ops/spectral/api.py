"""spectral: a direction whose singular values are all alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kbfgs_ext.ops import checks
from kbfgs_ext.ops.checks import Tensors
from kbfgs_ext.ops.library import op
from kbfgs_ext.ops.registry import prefer

# Of four iterations (18): on singular values from 0.01 to 1 no odd polynomials of degree 5 composed
# bring all nearer to 1 (within 0.0126); tests/ops/test_spectral.py shows that they alternate.
COEFFICIENTS = (
    8.093368512548258, -23.62043032882427, 17.44615174983625,
    3.636585554259041, -2.721926746608908, 0.5365462883273613,
    2.661299985777099, -1.977154521884625, 0.452616406996401,
    1.956171638884454, -1.337507745944073, 0.3838527013298799,
)  # fmt: skip

# Of two inverses (18'): no rational function of their degree brings the singular values from 0.005
# to 1 nearer to 1 (within 0.0996); Zolotarev's, and tests/ops/test_spectral.py shows that they
# alternate.
WEIGHTS = (0.8490016030355411, 0.01727801440383314, 0.23772506135520405)
SHIFTS = (7.853246321035182e-05, 0.01920639484475042)
MOST_INVERSES = 3  # that ``work`` has room for

MULTIPLE = 16  # elements: rows in ``work`` may begin on 64 bytes in float32


def only_value(coefficients: Sequence[float], shifts: Sequence[float] | None) -> float:
    """What `polar_` makes of the one singular value of a matrix of one row: about 1."""
    if shifts is not None:
        both = zip(coefficients[1:], shifts, strict=True)
        return coefficients[0] + sum(c / (1 + s) for c, s in both)
    Z = G = 1.0
    for a, b, c in zip(*(coefficients[i::3] for i in range(3)), strict=True):
        R = a + b * G + c * G * G
        Z, G = R * Z, R * R * G
    return Z


def rounded_up(n: int) -> int:
    """``n`` rounded up to `MULTIPLE`."""
    return -(-n // MULTIPLE) * MULTIPLE


def workspace_size(n_g: int, n_a: int) -> int:
    """Elements of one layer's ``work`` in `polar_`: five k x k matrices, P and P', all with sides
    rounded up."""
    k, n = sorted(map(rounded_up, (n_g, n_a)))
    return k * (5 * k + 2 * n)


@op("spectral", writes=("P", "work"))
def polar_(
    P: Tensors,
    work: Tensors,
    coefficients: Sequence[float],
    ridge: float = 0.0,
    shifts: Sequence[float] | None = None,
    backend: str = "auto",
) -> None:
    """The polar factor of every layer's direction, in its place: singular values of about 1.

    (16)  G = X X',  X = P, or P' where that has fewer rows, over its largest entry
    (17)  G <- (G + ridge*tr(G)/k*I)/norm,  norm = ||G||_F + ridge*tr(G)/k;  Z = I
    (18)  R = a*I + b*G + c*G^2,  Z <- R Z,  G <- R^2 G;  once for every (a, b, c)
    (18') or, with shifts s:  Z = c_0*I + sum of c_i (G + s_i*I)^-1
    (19)  P <- Z X/sqrt(norm), transposed back

    The singular vectors stay, and so does a singular value of 0; those below a hundredth of the
    largest, or a two-hundredth with `SHIFTS`, come out below 1, in proportion to what they were
    (README.md in this folder).

    Args:
        P: (n_g, n_a) each, replaced. 0 stays 0. An entry that is not finite makes all of its P NaN.
        work: scratch of `workspace_size` elements each. On the CPU layers may share its storage;
            the GPU backends work on all layers at once and need one each.
        coefficients: a, b, c of every iteration, one after the other, such as `COEFFICIENTS`; with
            ``shifts`` c, such as `WEIGHTS`.
        ridge: at least 0. Singular values become sigma/sqrt(sigma^2 + ridge*v) with v the mean of
            sigma^2 over the k of a layer: the small ones, where the noise is, stay small.
        shifts: positive and at most `MOST_INVERSES`, such as `SHIFTS`. Less than half the time on
            a CPU; the GPU backends make no inverses.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device, ``coefficients``, ``shifts`` or ``ridge`` does not fit.

    Source: Newton-Schulz iteration on the Gram matrix; coefficients as in Amsel, Persson, Musco,
    Gower, "The Polar Express", arXiv 2505.16932. Inverses: Nakatsukasa, Freund, SIAM Review 58
    (2016), "Computing fundamental matrix decompositions accurately via the matrix sign function in
    two iterations: the power of Zolotarev's functions".
    """
    checks.backend(backend)
    checks.same_length(P=P, work=work)
    if shifts is not None:
        if not 0 < len(shifts) <= MOST_INVERSES or len(coefficients) != len(shifts) + 1:
            raise ValueError(
                f"shifts must be 1 to {MOST_INVERSES} and one fewer than coefficients,"
                f" got {len(shifts)} and {len(coefficients)}"
            )
        if not all(math.isfinite(s) and s > 0 for s in shifts):
            raise ValueError(f"shifts must be finite and above 0, got {tuple(shifts)}")
    elif not coefficients or len(coefficients) % 3:
        raise ValueError(f"coefficients must be triples, got {len(coefficients)} numbers")
    if not all(map(math.isfinite, coefficients)):
        raise ValueError(f"coefficients must be finite, got {tuple(coefficients)}")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
    for i, p in enumerate(P):
        checks.real("P", i, p)
        if p.dim() != 2 or p.numel() == 0:
            raise ValueError(f"P[{i}] must be a matrix with entries, got {tuple(p.shape)}")
        wanted = workspace_size(*p.shape)
        if work[i].dim() != 1 or work[i].numel() < wanted:
            raise ValueError(
                f"work[{i}] must be a vector of at least {wanted} elements,"
                f" got {tuple(work[i].shape)}"
            )
        checks.like("work", i, work[i], p)


# By the counts: 3t + 4 launches for all layers in place of t + 4 and 4t - 1 products a layer, half
# of their FLOPs, and three TF32 products for one where torch allows TF32 (README.md).
prefer("polar_", "triton")
