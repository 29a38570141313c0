"""The scales of relative dampings in Triton: (21), (22), a program per layer, a launch each."""

from __future__ import annotations

import triton
import triton.language as tl

from kbfgs_ext.ops.triton_common import (
    TABLES,
    VECTORS,
    at,
    by_rows,
    finite,
    flag,
    launch,
    locate,
    number,
    pointer,
    real_type,
    size,
    vector,
)

# Words of a row: of the inputs' scales, where elements are counted; and of a pair's.
V, LAM_A, NORM, DAMPING, ELEMENTS = (tl.constexpr(i) for i in range(5))
N, SS, YY, G_BAR, G_NEXT, H_CHANGE = (tl.constexpr(i) for i in range(6))
WORDS = 6


@triton.jit
def followed(old, new, share):
    """A moving average that begins with the first value that is finite and not 0."""
    average = tl.where(old > 0, old + share * (new - old), new)
    return tl.where(finite(new), average, old)


@triton.jit
def _measure_inputs(
    starts, rows, ok, share: tl.float64, WORDS: tl.constexpr, ENTRIES: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    entry, _ = locate(starts, ENTRIES)
    row, live = rows + entry * WORDS, flag(ok)
    norm = tl.load(at(row, NORM, T)).to(tl.float64)
    elements = number(tl.load(row + ELEMENTS), tl.float64)
    v = followed(tl.load(at(row, V, tl.float64)), norm * norm / elements, share)  # (21)
    damping = tl.load(at(row, DAMPING, tl.float64))
    tl.store(at(row, V, tl.float64), v, mask=live)
    tl.store(at(row, LAM_A, tl.float64), tl.where(v > 0, v, 1.0) * damping, mask=live)


@triton.jit
def _measure_pair(
    starts, rows, ok, share: tl.float64, WORDS: tl.constexpr, ENTRIES: tl.constexpr,
    T: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    entry, _ = locate(starts, ENTRIES)
    row, live = rows + entry * WORDS, flag(ok)
    n, g_bar, g_next = size(row, N), at(row, G_BAR, T), at(row, G_NEXT, T)
    squares_s, squares_y = tl.zeros((LENGTH,), tl.float64), tl.zeros((LENGTH,), tl.float64)
    for j0 in tl.range(0, n, LENGTH):
        j = j0 + tl.arange(0, LENGTH)
        s = vector(at(row, H_CHANGE, T), j, n).to(tl.float64)
        y = (vector(g_next, j, n) - vector(g_bar, j, n)).to(tl.float64)
        squares_s += s * s
        squares_y += y * y
    old_s, old_y = tl.load(at(row, SS, tl.float64)), tl.load(at(row, YY, tl.float64))
    ss = followed(old_s, tl.sum(squares_s, 0), share)  # (22)
    yy = followed(old_y, tl.sum(squares_y, 0), share)
    unit = tl.where((ss > 0) & (yy > 0), tl.sqrt(ss / yy), 1.0).to(T)
    tl.debug_barrier()  # every thread has read the averages
    for j0 in tl.range(0, n, LENGTH):
        j = j0 + tl.arange(0, LENGTH)
        inside = (j < n) & live
        tl.store(g_bar + j, unit * vector(g_bar, j, n), mask=inside)
        tl.store(g_next + j, unit * vector(g_next, j, n), mask=inside)
    tl.store(at(row, SS, tl.float64), ss, mask=live)
    tl.store(at(row, YY, tl.float64), yy, mask=live)


def measure_inputs_(v, lam_a, norms, elements, damping, share, ok) -> None:
    """(21) for all layers: one launch."""
    if not norms:
        return
    T, device = real_type(*norms), norms[0].device
    rows = [
        [*map(pointer, (v[i], lam_a[i], norm, damping[i])), int(elements[i]), 0]
        for i, norm in enumerate(norms)
    ]
    table = TABLES.get(device, rows, [1] * len(rows))
    launch(
        _measure_inputs, table.programs[0], table.starts[0], table.rows, ok, share, WORDS=WORDS,
        ENTRIES=table.entries, T=T, num_warps=1, device=device,
    )  # fmt: skip


def measure_pair_(ss, yy, g_bar, g_bar_next, h_change, share, ok) -> None:
    """(22) for all layers: one launch."""
    if not g_bar:
        return
    T, device = real_type(*g_bar, *g_bar_next), g_bar[0].device
    change, rows = by_rows(h_change), []
    for i, g in enumerate(g_bar):
        vectors = (ss[i], yy[i], g, g_bar_next[i], change[i])
        rows.append([g.shape[0], *map(pointer, vectors)])
    table = TABLES.get(device, rows, [1] * len(rows))
    launch(
        _measure_pair, table.programs[0], table.starts[0], table.rows, ok, share, WORDS=WORDS,
        ENTRIES=table.entries, T=T, LENGTH=VECTORS.length, num_warps=VECTORS.warps, device=device,
    )  # fmt: skip
