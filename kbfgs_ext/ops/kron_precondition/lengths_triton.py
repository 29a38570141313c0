"""The sizes of the layers' steps (23) in Triton: a program per group, a launch each."""

from __future__ import annotations

import triton
import triton.language as tl

from kbfgs_ext.ops.triton_common import launch, pointer, real_type, vector

SHORTEST = tl.constexpr(1e-20)  # length of a direction that still is one
LENGTH = 64  # layers at a time


@triton.jit
def lengths_at(norms, j, n):
    """In float64; a NaN stays."""
    length = vector(norms, j, n).to(tl.float64)
    return tl.where(length < SHORTEST, SHORTEST, length)


@triton.jit
def _lengths(
    sizes, norms, roots, step_size, n: tl.int64, SHARED: tl.constexpr, LENGTH: tl.constexpr
):
    size = tl.load(step_size)
    if SHARED:
        squares, rows = tl.zeros((LENGTH,), tl.float64), tl.zeros((LENGTH,), tl.float64)
        for j0 in tl.range(0, n, LENGTH):
            j = j0 + tl.arange(0, LENGTH)
            length, root = lengths_at(norms, j, n), vector(roots, j, n)
            squares += tl.where(j < n, length * length, 0.0)
            rows += root * root
        size *= tl.sqrt(tl.sum(squares, 0)) / tl.sqrt(tl.sum(rows, 0))
    for j0 in tl.range(0, n, LENGTH):
        j = j0 + tl.arange(0, LENGTH)
        new = size * vector(roots, j, n) / lengths_at(norms, j, n)  # (23)
        tl.store(sizes + j, new, mask=j < n)


def lengths_(sizes, norms, roots, step_size, shared) -> None:
    """(23): one launch for each group."""
    if not norms:
        return
    real_type(*norms)
    for t in (*norms, *sizes, *roots):
        pointer(t)  # declines what has gaps
    for i, own in enumerate(norms):
        launch(
            _lengths, 1, sizes[i], own, roots[i], step_size[i], own.numel(), SHARED=bool(shared),
            LENGTH=LENGTH, num_warps=1, device=own.device,
        )  # fmt: skip
