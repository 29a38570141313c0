"""Restarts (12) in Triton: a program per layer, one launch.

A program reads and writes a few counters. H and tr A are touched only where it comes to a restart,
which is rare, so that part is plain.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbfgs_ext.ops.factor_ema.triton import M, tile_of_X, words_of_X
from kbfgs_ext.ops.triton_common import (
    COUNTS,
    LAM,
    LD_H,
    TABLES,
    H,
    N,
    alike,
    at,
    by_rows,
    finite,
    input_type,
    launch,
    locate,
    matrix,
    pointer,
    real_type,
    size,
    tile,
)

# Words of a row beside those of a factor; X has the words of factor_ema here.
A, LD_A = tl.constexpr(10), tl.constexpr(11)
PUSHED, MARKS, FORCE = (tl.constexpr(i) for i in range(14, 17))
WORDS = 17
ACCEPTED, REJECTED = tl.constexpr(0), tl.constexpr(1)  # words of `counts`
EDGE = 32  # of its tiles: few registers for a launch that mostly ends at once


@triton.jit
def _divisor(row, n, TRACE: tl.constexpr, XT: tl.constexpr, T: tl.constexpr, EDGE: tl.constexpr):
    """lam + tr A, from "A" or "X"."""
    e, trace = tl.arange(0, EDGE), tl.zeros((EDGE, EDGE), tl.float64)
    if TRACE == "A":
        for k in tl.range(0, n, EDGE):
            part = tile(at(row, A, T), tl.load(row + LD_A), k + e, k + e, n, n)
            trace += tl.where(e[:, None] == e[None, :], part, 0.0)
    else:
        for r0 in tl.range(0, size(row, M), EDGE):
            for j0 in tl.range(0, n, EDGE):
                x = tile_of_X(row, r0 + e, j0 + e, XT, tl.float64)
                trace += x * x / size(row, M)
    return tl.load(at(row, LAM, tl.float64)) + tl.sum(trace)


@triton.jit
def _restart(
    starts, rows, after: tl.int64, FORCED: tl.constexpr, TRACE: tl.constexpr, XT: tl.constexpr,
    T: tl.constexpr, WORDS: tl.constexpr, ENTRIES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    entry, _ = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, counts, marks = size(row, N), at(row, COUNTS, tl.int64), at(row, MARKS, tl.int64)
    accepted, rejected = tl.load(counts + ACCEPTED), tl.load(counts + REJECTED)
    begin = tl.where(accepted > tl.load(marks), rejected, tl.load(marks + 1))
    now = rejected - begin >= after
    if FORCED:
        now = now | (tl.load(at(row, FORCE, tl.int8)) != 0)
    divisor = tl.full((), 1.0, tl.float64)
    if now:
        if TRACE is not None:  # noqa: SIM102, known at compile time
            if tl.load(row + LAM) != 0:
                divisor = _divisor(row, n, TRACE, XT, T, EDGE)
        now = finite(divisor)
    tl.debug_barrier()  # every thread has read the marks
    if now:
        e = tl.arange(0, EDGE)
        for i0 in tl.range(0, n, EDGE):  # a ring has n = 0
            for j0 in tl.range(0, n, EDGE):
                i, j = i0 + e[:, None], j0 + e[None, :]
                new = tl.where(i == j, 1.0 / divisor, 0.0).to(T)
                H_ = at(row, H, T) + i * tl.load(row + LD_H) + j
                tl.store(H_, new, mask=(i < n) & (j < n))
        if n == 0:
            tl.store(at(row, PUSHED, tl.int64), 0)
        tl.store(marks + 2, tl.load(marks + 2) + 1)
    tl.store(marks, accepted)
    tl.store(marks + 1, tl.where(now, rejected, begin))


def scalar(tensors, i: int) -> int:
    """Address of the ``i``-th, 0 where there is none."""
    return pointer(tensors[i]) if i < len(tensors) else 0


@alike("X")
def restart_(H, pushed, marks, counts, lam, A, X, force, after) -> None:
    """(12) for all layers: one launch, which ends where nothing restarts."""
    if not marks:
        return
    T, device, A, X = real_type(*H) if H else tl.float32, marks[0].device, by_rows(A), by_rows(X)
    rows = []
    for i, mark in enumerate(marks):
        n, own = (H[i].shape[0], matrix(H[i])) if H else (0, (0, 0))
        last = words_of_X(X[i]) if i < len(X) else [*(matrix(A[i]) if i < len(A) else (0, 0)), 0, 0]
        row = [n, *own, *[0] * 4, pointer(counts[i]), scalar(lam, i), 0, *last]
        rows.append([*row, scalar(pushed, i), pointer(mark), scalar(force, i)])
    table = TABLES.get(device, rows, [1] * len(marks))
    launch(
        _restart, table.programs[0], table.starts[0], table.rows, after, FORCED=bool(force),
        TRACE="A" if A else "X" if X else None, XT=input_type(X) if X else T, T=T, WORDS=WORDS,
        ENTRIES=table.entries, EDGE=EDGE, device=device,
    )  # fmt: skip
