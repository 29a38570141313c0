"""lbfgs_two_loop: the limited-memory inverse factor applied, and its ring of pairs."""

from __future__ import annotations

import torch

from kbfgs_ext.ops import checks
from kbfgs_ext.ops.checks import Tensors
from kbfgs_ext.ops.library import op
from kbfgs_ext.ops.registry import Call, prefer

FORMS = ("auto", "recursion", "compact")


@op("lbfgs_two_loop", writes=("out",))
def lbfgs_two_loop_(
    out: Tensors,
    Q: Tensors,
    S: Tensors,
    Y: Tensors,
    rho: Tensors,
    pushed: Tensors,
    form: str = "auto",
    backend: str = "auto",
) -> None:
    """out = H Q, with H the L-BFGS inverse of the stored pairs on H_0 = I, for all layers (11).

    Args:
        out: like ``Q``, written; it may not overlap Q.
        Q: (n, columns) or (n,) each.
        S, Y: (p, n) each: the pairs, one a row, in a ring.
        rho: (p,) each: 1/s'y of each row.
        pushed: int64 scalar each, on the device: pairs accepted so far, or since a restart; the
            newest is in row ``(pushed - 1) % p``. What is in rows that hold no pair is ignored.
        form: "recursion" (2p sweeps), "compact" (matrix products), or "auto" by size, on a GPU by
            p. Both are exact in exact arithmetic.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device or ``form`` does not fit.

    Source: section 2 of the paper's K-BFGS(L); Nocedal 1980; Byrd, Nocedal, Schnabel 1994.
    """
    checks.backend(backend)
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    checks.same_length(out=out, Q=Q, S=S, Y=Y, rho=rho, pushed=pushed)
    for i, q in enumerate(Q):
        if q.dim() not in (1, 2):
            raise ValueError(f"Q[{i}] must be a vector or a matrix, got shape {tuple(q.shape)}")
        checks.shape("out", i, out[i], *q.shape)
        p = S[i].shape[0]
        for name, pairs in (("S", S[i]), ("Y", Y[i])):
            checks.shape(name, i, pairs, p, q.shape[0])
            checks.like(name, i, pairs, q)
        checks.shape("rho", i, rho[i], p)


def _matrices(call: Call) -> bool:
    return call["form"] == "compact" or any(q.dim() == 2 for q in call["Q"])


# On an H100, 100 pairs, the MNIST autoencoder's layers, in ms: recursion 0.50 in Triton, 0.77 in
# CUDA; compact form 1.1 in Triton, 1.5 of cuBLAS's products. Of 10 pairs 0.07, 0.10; 0.18, 0.93.
prefer("lbfgs_two_loop_", "triton", _matrices)


@op("lbfgs_two_loop", writes=("S", "Y", "rho", "pushed", "counts"))
def lbfgs_push_(
    S: Tensors,
    Y: Tensors,
    rho: Tensors,
    pushed: Tensors,
    counts: Tensors,
    s: Tensors,
    y: Tensors,
    c: Tensors,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Put a pair into each ring if it passes the gate (8); the oldest pair drops out.

    Args:
        S, Y, rho, pushed: as in `lbfgs_two_loop_`, updated where the pair is accepted.
        counts: (4,) int64 each: accepted, rejected, Powell-damped, LM-damped; the first two count.
        s, y: (n,) each.
        c: (n,) each: reference vector of the gate.
        ok: bool scalar on the device; where false nothing happens and nothing is counted.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    checks.backend(backend)
    checks.same_length(S=S, Y=Y, rho=rho, pushed=pushed, counts=counts, s=s, y=y, c=c)
    for i, pairs in enumerate(S):
        p, n = pairs.shape
        checks.shape("Y", i, Y[i], p, n)
        checks.shape("rho", i, rho[i], p)
        for name, v in (("s", s[i]), ("y", y[i]), ("c", c[i])):
            checks.shape(name, i, v, n)
            checks.like(name, i, v, pairs)
