"""double_damping in Triton: equations (5) to (7), one program per layer and decision.

launch                   programs            bytes per layer, element size e
`_pair_ema`              one per layer       5 n e read twice (the second time from cache), 2 n e
`_products`              per 16 rows         n^2 e read: H y and H s in one pass over H
`_damp`                  one per layer       4 n e read, 3 n e written
`_damped_product`        per 16 rows         n^2 e read, but only where both dampings were at work

The damped y is t*y + (1-t)*s, so H y follows from H y and H s without another pass over H, unless
Powell's damping has put Hy into s: then H is read again. 6 n FLOPs in place of 2 n^2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kbfgs_ext.ops.double_damping.measure_triton import measure_inputs_ as measure_inputs_
from kbfgs_ext.ops.double_damping.measure_triton import measure_pair_ as measure_pair_
from kbfgs_ext.ops.triton_common import (
    COUNTS,
    HY,
    LAM,
    LD_H,
    TABLES,
    VECTORS,
    H,
    N,
    S,
    Y,
    at,
    blocks,
    by_rows,
    divide,
    finite,
    flag,
    launch,
    locate,
    matrix,
    number,
    pointer,
    product,
    real_type,
    size,
    tile,
    vector,
)

# More words of a row: the moving averages, and what they average.
S_AVG, Y_AVG, H_CHANGE, G_BAR, G_NEXT = (tl.constexpr(i) for i in range(10, 15))
AVERAGE_WORDS = 15
# One more word of a row in `double_damping_`: where the layer's H s begins in the scratch.
HS = tl.constexpr(9)
DAMP_WORDS = 10

LIVE, REDO = tl.constexpr(1), tl.constexpr(2)  # bits of `flags`: may count; H y must be redone
POWELL, LM = tl.constexpr(2), tl.constexpr(3)  # words of `counts`


@triton.jit
def averaged(row, j, n, decay, T: tl.constexpr):
    """(5): elements j of the new averages s and y, and whether what they average is finite."""
    beta, rest = number(decay, T), number(1 - decay, T)
    change = vector(at(row, H_CHANGE, T), j, n)
    g, g_next = vector(at(row, G_BAR, T), j, n), vector(at(row, G_NEXT, T), j, n)
    s = beta * vector(at(row, S_AVG, T), j, n) + rest * change
    y = beta * vector(at(row, Y_AVG, T), j, n) + rest * (g_next - g)
    return s, y, finite(change) & finite(g) & finite(g_next)


@triton.jit
def update_averages(row, n, decay, live, T: tl.constexpr, LENGTH: tl.constexpr):
    """(5) in place where ``live`` and where all of s and y stay finite.

    Returns whether all means were finite, and whether the averages have changed.
    """
    bad_mean = tl.zeros((LENGTH,), tl.int32)
    bad_pair = tl.zeros((LENGTH,), tl.int32)
    for j0 in tl.range(0, n, LENGTH):
        s, y, fine = averaged(row, j0 + tl.arange(0, LENGTH), n, decay, T)
        bad_mean |= (~fine).to(tl.int32)
        bad_pair |= (~(finite(s) & finite(y))).to(tl.int32)
    fine = tl.max(bad_mean, 0) == 0
    keep = live & (tl.max(bad_pair, 0) == 0)
    for j0 in tl.range(0, n, LENGTH):
        j = j0 + tl.arange(0, LENGTH)
        s, y, _ = averaged(row, j, n, decay, T)
        tl.store(at(row, S_AVG, T) + j, s, mask=(j < n) & keep)
        tl.store(at(row, Y_AVG, T) + j, y, mask=(j < n) & keep)
    tl.debug_barrier()  # what this program has written is read again in another layout
    return fine, keep


@triton.jit
def damp(row, s_in, y_in, Hs, n, mu1, live, T: tl.constexpr, LENGTH: tl.constexpr):
    """(6), (7): s_in, y_in -> the row's S, Y; its HY follows. All read n elements, so does Hs.

    ``Hs`` may be the row's Y. Returns whether HY still has to be computed from the damped y.
    """
    s_out, y_out, Hy = at(row, S, T), at(row, Y, T), at(row, HY, T)
    mu2 = tl.load(at(row, LAM, tl.float64)).to(T)

    sy, yHy = tl.zeros((LENGTH,), T), tl.zeros((LENGTH,), T)
    for j0 in tl.range(0, n, LENGTH):
        j = j0 + tl.arange(0, LENGTH)
        y = vector(y_in, j, n)
        sy += vector(s_in, j, n) * y
        yHy += y * vector(Hy, j, n)
    sy_, yHy_ = tl.sum(sy, 0), tl.sum(yHy, 0)
    powell = live & ~(sy_ > number(mu1, T) * yHy_)  # (6)
    theta = divide(number(1 - mu1, T) * yHy_, yHy_ - sy_)

    sy, ss = tl.zeros((LENGTH,), T), tl.zeros((LENGTH,), T)
    for j0 in tl.range(0, n, LENGTH):
        j = j0 + tl.arange(0, LENGTH)
        s = vector(s_in, j, n)
        s = tl.where(powell, theta * s + (1 - theta) * vector(Hy, j, n), s)
        tl.store(s_out + j, s, mask=j < n)
        sy += s * vector(y_in, j, n)
        ss += s * s
    sy_, ss_ = tl.sum(sy, 0), tl.sum(ss, 0)
    lm = live & ~(sy_ > mu2 * ss_)  # (7)
    theta = divide((1 - mu2) * ss_, ss_ - sy_)
    tl.debug_barrier()

    for j0 in tl.range(0, n, LENGTH):
        j = j0 + tl.arange(0, LENGTH)
        s, y, Hy_j = vector(s_out, j, n), vector(y_in, j, n), vector(Hy, j, n)
        if Hs is not None:
            mixed = theta * Hy_j + (1 - theta) * vector(Hs, j, n)
            tl.store(Hy + j, mixed, mask=(j < n) & lm & ~powell)
        tl.store(y_out + j, tl.where(lm, theta * y + (1 - theta) * s, y), mask=j < n)

    counts = at(row, COUNTS, tl.int64)
    tl.store(counts + POWELL, tl.load(counts + POWELL) + powell)
    tl.store(counts + LM, tl.load(counts + LM) + lm)
    return powell & lm


@triton.jit
def two_products(H, stride, u, v, i, n, T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows ``i`` of H u and H v in one pass over H."""
    Hu, Hv = tl.zeros((ROWS, COLS), T), tl.zeros((ROWS, COLS), T)
    for j0 in tl.range(0, n, COLS):
        j = j0 + tl.arange(0, COLS)
        part = tile(H, stride, i, j, n, n)
        Hu += part * vector(u, j, n)[None, :]
        Hv += part * vector(v, j, n)[None, :]
    return tl.sum(Hu, 1), tl.sum(Hv, 1)


@triton.jit
def _pair_ema(
    starts, rows, ok, decay: tl.float64,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    entry, _ = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    update_averages(row, size(row, N), decay, flag(ok), T, LENGTH)


@triton.jit
def _products(
    starts, rows, Hs_all, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n = size(row, N)
    i = block * ROWS + tl.arange(0, ROWS)
    H_, y, s = at(row, H, T), at(row, Y, T), at(row, S, T)
    Hy, Hs = two_products(H_, tl.load(row + LD_H), y, s, i, n, T, ROWS, COLS)
    tl.store(at(row, HY, T) + i, Hy, mask=i < n)
    tl.store(Hs_all + tl.load(row + HS) + i, Hs, mask=i < n)


@triton.jit
def _damp(
    starts, rows, Hs_all, flags, ok, mu1: tl.float64, HAS_H: tl.constexpr,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    entry, _ = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    s, y, live = at(row, S, T), at(row, Y, T), flag(ok)
    if HAS_H:
        Hs = Hs_all + tl.load(row + HS)
        redo = damp(row, s, y, Hs, size(row, N), mu1, live, T, LENGTH)
        tl.store(flags + entry, tl.where(redo, REDO, 0))
    else:
        damp(row, s, y, None, size(row, N), mu1, live, T, LENGTH)


@triton.jit
def _damped_product(
    starts, rows, flags, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n = size(row, N)
    i = block * ROWS + tl.arange(0, ROWS)
    if tl.load(flags + entry) == REDO:
        Hy = product(at(row, H, T), tl.load(row + LD_H), at(row, Y, T), i, n, T, ROWS, COLS)
        tl.store(at(row, HY, T) + i, Hy, mask=i < n)


def pair_ema_(s, y, h_change, g_bar, g_bar_next, decay, ok) -> None:
    """(5) for all layers: one launch."""
    if not s:
        return
    T, device = real_type(*s), s[0].device
    means = [by_rows(given) for given in (h_change, g_bar, g_bar_next)]
    rows = []
    for i, v in enumerate(s):
        vectors = (v, y[i], *(given[i] for given in means))
        rows.append([v.shape[0], *[0] * 9, *map(pointer, vectors)])
    table = TABLES.get(device, rows, [1] * len(rows))
    launch(
        _pair_ema, table.programs[0], table.starts[0], table.rows, ok, decay,
        WORDS=AVERAGE_WORDS, ENTRIES=table.entries, T=T, LENGTH=VECTORS.length,
        num_warps=VECTORS.warps, device=device,
    )  # fmt: skip


def double_damping_(s, y, Hy, counts, H, lam, mu1, ok) -> None:
    """(6), (7) for all layers: three launches, or one where the caller gives Hy."""
    if not s:
        return
    T, device = real_type(*s), s[0].device
    total = sum(v.shape[0] for v in s)
    Hs = torch.empty(total if H else 0, dtype=s[0].dtype, device=device)
    flags = torch.empty(len(s), dtype=torch.int32, device=device)
    rows, offset = [], 0
    for i, v in enumerate(s):
        n = v.shape[0]
        factor = matrix(H[i]) if H else (0, 0)
        rows.append([
            n, *factor, pointer(v), pointer(y[i]), pointer(Hy[i]), 0, pointer(counts[i]),
            pointer(lam[i]), offset,
        ])  # fmt: skip
        offset += n
    row_blocks = [blocks(v.shape[0], VECTORS.rows) for v in s]
    table = TABLES.get(device, rows, row_blocks, [1] * len(s))
    common: dict[str, Any] = dict(
        WORDS=DAMP_WORDS, ENTRIES=table.entries, T=T, num_warps=VECTORS.warps, device=device
    )
    shape: dict[str, Any] = dict(ROWS=VECTORS.rows, COLS=VECTORS.cols)
    products, (count, singles) = table.starts[0], table.programs
    if H:
        launch(_products, count, products, table.rows, Hs, **shape, **common)
    launch(
        _damp, singles, table.starts[1], table.rows, Hs, flags, ok, mu1, HAS_H=bool(H),
        LENGTH=VECTORS.length, **common,
    )  # fmt: skip
    if H:
        launch(_damped_product, count, products, table.rows, flags, **shape, **common)
