"""bfgs_update in Triton: the curvature update of all layers in four launches, five with X.

A *factor* is an H_a or an H_g; all of them share each launch. Bytes per factor, e per element:

launch        programs        H_a side                            H_g side
`_first`      per 16 rows     s = H a_bar           n^2 e read    (5), H y and H s    n^2 e read
`_partials`   per 32 rows X   (X only)              m d_in e read
`_second`     per 16 rows     y = A s + lam s       n^2 e read    (5) kept, (6), (7)  10 n e
`_third`      per 16 rows     H y, dot products     n^2 e read    dot products        3 n e read
`_update`     per tile        (8), (9)       n^2 e/2 read, n^2 e written; the same for H_g

So H_a is read 2.5 times and H_g 1.5 times, each written once; A or X is read once. H is symmetric:
`_update` reads the tiles on and below the diagonal and writes each to both places. It takes
s'y, s's, c'c, y'Hy and |Hy|^2 from the row blocks' parts, so no launch is spent on scalars.
The damped y is a mixture of y and s, so H y is one too: H_g is read once more only where both
dampings were at work (see `double_damping`). FLOPs: 2 n^2 per product, 5 n^2/2 for the update.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from kbfgs_ext.ops.bfgs_update.reference import CURVATURE_GATE
from kbfgs_ext.ops.bfgs_update.restart_triton import restart_ as restart_
from kbfgs_ext.ops.double_damping.triton import (
    LIVE,
    REDO,
    S_AVG,
    Y_AVG,
    averaged,
    damp,
    two_products,
    update_averages,
)
from kbfgs_ext.ops.factor_ema.triton import (
    ROWS_OF_X,
    gathered,
    launch_partials,
    row_blocks_of_X,
    words_of_X,
)
from kbfgs_ext.ops.triton_common import (
    COUNTS,
    HY,
    LAM,
    LD_H,
    TABLES,
    VECTORS,
    C,
    H,
    N,
    S,
    Y,
    alike,
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
    root,
    size,
    store_both,
    tile,
    triangle,
    vector,
    warps,
)

# Words of a row: those of a pair, the kind of the factor, then what that kind needs.
KIND = tl.constexpr(9)
ACTIVATION, GRADIENT, GIVEN = (tl.constexpr(i) for i in range(3))  # GIVEN: the caller has Hy
A, LD_A = tl.constexpr(10), tl.constexpr(11)  # X has the words of factor_ema here
WORDS = 16
DOTS = tl.constexpr(8)  # s'y, s's, c'c, y'Hy, Hy'Hy of a row block, to a 32-byte sector
GATE = tl.constexpr(CURVATURE_GATE)
ACCEPTED, REJECTED = tl.constexpr(0), tl.constexpr(1)  # words of `counts`


@dataclasses.dataclass(frozen=True)
class Update:
    """The rank-2 update: a program per tile of the lower triangle.

    64 x 64 in fp32 is 16 registers of each of 256 threads, and 16 KB of shared memory to turn the
    tile over; rows of 64 are whole 32-byte sectors in both places. Larger tiles leave SMs idle
    (the MNIST autoencoder has 912 of them for 132 SMs), smaller ones reread the dot products.
    """

    tile: int = 64
    warps: int = 8


UPDATE = Update()


@triton.jit
def _first(
    starts, rows, decay: tl.float64,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, H_, stride = size(row, N), at(row, H, T), tl.load(row + LD_H)
    i = block * ROWS + tl.arange(0, ROWS)
    if tl.load(row + KIND) == ACTIVATION:
        s = product(H_, stride, at(row, C, T), i, n, T, ROWS, COLS)  # (10)
        tl.store(at(row, S, T) + i, s, mask=i < n)
    else:
        Hy, Hs = tl.zeros((ROWS, COLS), T), tl.zeros((ROWS, COLS), T)
        for j0 in tl.range(0, n, COLS):
            j = j0 + tl.arange(0, COLS)
            s, y, _ = averaged(row, j, n, decay, T)  # (5), stored by _second: others read it now
            part = tile(H_, stride, i, j, n, n)
            Hy += part * y[None, :]
            Hs += part * s[None, :]
        tl.store(at(row, HY, T) + i, tl.sum(Hy, 1), mask=i < n)
        tl.store(at(row, Y, T) + i, tl.sum(Hs, 1), mask=i < n)  # until damp writes y there


@triton.jit
def _second(
    starts, rows, parts, flags, ok, decay: tl.float64, mu1: tl.float64, FROM_X: tl.constexpr,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LENGTH: tl.constexpr, X_ROWS: tl.constexpr,
):  # fmt: skip
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, s, y = size(row, N), at(row, S, T), at(row, Y, T)
    if tl.load(row + KIND) == ACTIVATION:
        i = block * ROWS + tl.arange(0, ROWS)
        if FROM_X:
            As = gathered(row, parts, i, n, T, ROWS, X_ROWS)
        else:
            As = product(at(row, A, T), tl.load(row + LD_A), s, i, n, T, ROWS, COLS)
        lam = tl.load(at(row, LAM, tl.float64)).to(T)
        tl.store(y + i, As + lam * vector(s, i, n), mask=i < n)  # (10)
    else:
        fine, kept = update_averages(row, n, decay, flag(ok), T, LENGTH)
        live = flag(ok) & fine
        s_avg, y_avg, Hy = at(row, S_AVG, T), at(row, Y_AVG, T), at(row, HY, T)
        if live & ~kept:  # finite means whose average is not: H y and H s of the old pair
            for i0 in tl.range(0, n, ROWS):
                i = i0 + tl.arange(0, ROWS)
                H_, stride = at(row, H, T), tl.load(row + LD_H)
                Hy_i, Hs_i = two_products(H_, stride, y_avg, s_avg, i, n, T, ROWS, COLS)
                tl.store(Hy + i, Hy_i, mask=i < n)
                tl.store(y + i, Hs_i, mask=i < n)
            tl.debug_barrier()
        redo = damp(row, s_avg, y_avg, y, n, mu1, live, T, LENGTH)  # (6), (7)
        tl.store(flags + entry, tl.where(live, LIVE, 0) + tl.where(redo, REDO, 0))


@triton.jit
def _third(
    starts, rows, dots, flags,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, kind = size(row, N), tl.load(row + KIND)
    i = block * ROWS + tl.arange(0, ROWS)
    s, y, c = at(row, S, T), at(row, Y, T), at(row, C, T)
    Hy = vector(at(row, HY, T), i, n)
    redo = kind == ACTIVATION
    if kind == GRADIENT:
        redo = (tl.load(flags + entry) & REDO) != 0
    if redo:
        Hy = product(at(row, H, T), tl.load(row + LD_H), y, i, n, T, ROWS, COLS)
        tl.store(at(row, HY, T) + i, Hy, mask=i < n)
    s, y, c = vector(s, i, n), vector(y, i, n), vector(c, i, n)
    dots += tl.program_id(0) * DOTS
    tl.store(dots + 0, tl.sum(s * y, 0))
    tl.store(dots + 1, tl.sum(s * s, 0))
    tl.store(dots + 2, tl.sum(c * c, 0))
    tl.store(dots + 3, tl.sum(y * Hy, 0))
    tl.store(dots + 4, tl.sum(Hy * Hy, 0))


@triton.jit
def _update(
    starts, row_starts, rows, dots, flags, ok,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n = size(row, N)
    live = flag(ok)
    if tl.load(row + KIND) == GRADIENT:
        live = (tl.load(flags + entry) & LIVE) != 0

    part = tl.arange(0, PARTS)
    mine = part < tl.cdiv(n, ROWS)
    dots += (tl.load(row_starts + entry) + part) * DOTS
    sy = tl.sum(tl.load(dots + 0, mask=mine, other=0.0), 0)
    ss = tl.sum(tl.load(dots + 1, mask=mine, other=0.0), 0)
    cc = tl.sum(tl.load(dots + 2, mask=mine, other=0.0), 0)
    yHy = tl.sum(tl.load(dots + 3, mask=mine, other=0.0), 0)
    HyHy = tl.sum(tl.load(dots + 4, mask=mine, other=0.0), 0)
    rho = divide(number(1.0, T), sy)
    coefficient = rho * rho * yHy + rho
    accept = live & (sy > 0) & (sy > number(GATE, T) * ss * root(cc)) & finite(rho)  # (8)
    accept = accept & (yHy >= 0) & finite(coefficient * ss) & finite(rho * HyHy)  # (8)

    block_i, block_j = triangle(t)
    if accept:
        i, j = block_i * TILE + tl.arange(0, TILE), block_j * TILE + tl.arange(0, TILE)
        H_, stride = at(row, H, T), tl.load(row + LD_H)
        s, Hy = at(row, S, T), at(row, HY, T)
        s_i, s_j = vector(s, i, n)[:, None], vector(s, j, n)[None, :]
        Hy_i, Hy_j = vector(Hy, i, n)[:, None], vector(Hy, j, n)[None, :]
        new = tile(H_, stride, i, j, n, n) - rho * (s_i * Hy_j + Hy_i * s_j)  # (9)
        new += coefficient * (s_i * s_j)  # (9)
        store_both(H_, stride, i, j, n, new, accept)
    if t == 0:
        counts = at(row, COUNTS, tl.int64)
        tl.store(counts + ACCEPTED, tl.load(counts + ACCEPTED) + accept)
        tl.store(counts + REJECTED, tl.load(counts + REJECTED) + (live & ~accept))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One call: its sizes, and per launch the programs of each factor."""

    sizes: list[int]

    @property
    def row_blocks(self) -> list[int]:
        return [blocks(n, VECTORS.rows) for n in self.sizes]

    @property
    def tiles(self) -> list[int]:
        return [b * (b + 1) // 2 for b in (blocks(n, UPDATE.tile) for n in self.sizes)]

    def scratch(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Dot products of every row block, and flags of every factor."""
        dots = torch.empty(sum(self.row_blocks) * DOTS.value, dtype=like.dtype, device=like.device)
        return dots, torch.empty(len(self.sizes), dtype=torch.int32, device=like.device)


def _finish(plan: _Plan, table, rows_at: int, dots, flags, ok, T, common) -> None:
    """`_third` and `_update`: launch ``rows_at`` of the table by row blocks, the next by tiles."""
    row_starts = table.starts[rows_at]
    launch(
        _third, table.programs[rows_at], row_starts, table.rows, dots, flags,
        COLS=VECTORS.cols, num_warps=VECTORS.warps, **common,
    )  # fmt: skip
    launch(
        _update, table.programs[rows_at + 1], table.starts[rows_at + 1], row_starts, table.rows,
        dots, flags, ok, PARTS=triton.next_power_of_2(max(plan.row_blocks)), TILE=UPDATE.tile,
        num_warps=warps(UPDATE.warps, T), **common,
    )  # fmt: skip


def bfgs_update_(H, counts, s, y, Hy, c, ok) -> None:
    """(8), (9) for all layers: two launches."""
    if not H:
        return
    T, device, plan = real_type(*H), H[0].device, _Plan([h.shape[0] for h in H])
    kind = (GIVEN if Hy else ACTIVATION).value
    dots, flags = plan.scratch(H[0])
    s, y, c, Hy = by_rows(s), by_rows(y), by_rows(c), by_rows(Hy)
    if not Hy:
        Hy = torch.empty(sum(plan.sizes), dtype=H[0].dtype, device=device).split(plan.sizes)
    rows = []
    for i, h in enumerate(H):
        vectors = map(pointer, (s[i], y[i], Hy[i], c[i], counts[i]))
        rows.append([plan.sizes[i], *matrix(h), *vectors, 0, kind, *[0] * 6])
    table = TABLES.get(device, rows, plan.row_blocks, plan.tiles)
    common: dict[str, Any] = dict(
        WORDS=WORDS, ENTRIES=table.entries, T=T, ROWS=VECTORS.rows, device=device
    )
    _finish(plan, table, 0, dots, flags, ok, T, common)


@alike("X")
def curvature_update_(
    H_a, H_g, s, y, counts_a, counts_g, work, A, X, a_bar, h_change, g_bar, g_bar_next, lam_a,
    lam_g, pair_decay, mu1, ok, ok_pair,
) -> None:  # fmt: skip
    """Steps 6 to 9 for all layers: four launches with A, five with X."""
    if not H_a and not H_g:
        return
    T, device = real_type(*H_a, *H_g), work[0].device
    plan = _Plan([h.shape[0] for h in (*H_a, *H_g)])
    X, A, a_bar = by_rows(X), by_rows(A), by_rows(a_bar)
    h_change, g_bar, g_bar_next = by_rows(h_change), by_rows(g_bar), by_rows(g_bar_next)
    x_rows = row_blocks_of_X(X) if X else [0] * len(H_a)
    rows, parts = [], 0
    for i, h in enumerate(H_a):
        n = h.shape[0]
        if X:
            last, parts = [*words_of_X(X[i]), parts, 0], parts + x_rows[i] * n
        else:
            last = [*matrix(A[i]), 0, 0, 0, 0]
        own = [*_slices(work[i], 0, n), pointer(a_bar[i]), pointer(counts_a[i]), pointer(lam_a[i])]
        rows.append([n, *matrix(h), *own, ACTIVATION.value, *last])
    for i, h in enumerate(H_g):
        n, skip = h.shape[0], 3 * (H_a[i].shape[0] if H_a else 0)
        pair = (s[i], y[i], h_change[i], g_bar[i], g_bar_next[i])
        own = [*_slices(work[i], skip, n), pointer(g_bar[i]), pointer(counts_g[i])]
        rows.append(
            [n, *matrix(h), *own, pointer(lam_g[i]), GRADIENT.value, *map(pointer, pair), 0]
        )
    table = TABLES.get(
        device, rows, plan.row_blocks, x_rows + [0] * len(H_g),
        plan.row_blocks[: len(H_a)] + [1] * len(H_g), plan.row_blocks, plan.tiles,
    )  # fmt: skip
    dots, flags = plan.scratch(work[0])
    products = torch.empty(parts, dtype=work[0].dtype, device=device)
    common: dict[str, Any] = dict(
        WORDS=WORDS, ENTRIES=table.entries, T=T, ROWS=VECTORS.rows, device=device
    )
    shape: dict[str, Any] = dict(COLS=VECTORS.cols, num_warps=VECTORS.warps)

    first, _, second = table.starts[:3]
    launch(_first, table.programs[0], first, table.rows, pair_decay, **shape, **common)
    if X:
        launch_partials(table, 1, products, X, WORDS, T)
    launch(
        _second, table.programs[2], second, table.rows, products, flags, ok_pair, pair_decay, mu1,
        FROM_X=bool(X), LENGTH=VECTORS.length, X_ROWS=ROWS_OF_X.rows, **shape, **common,
    )  # fmt: skip
    _finish(plan, table, 3, dots, flags, ok, T, common)


def _slices(work: torch.Tensor, skip: int, n: int) -> list[int]:
    """Addresses of s, y and Hy in a layer's scratch."""
    start, step = pointer(work), n * work.element_size()
    start += skip * work.element_size()
    return [start, start + step, start + 2 * step]
