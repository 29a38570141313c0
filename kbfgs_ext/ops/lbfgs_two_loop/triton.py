"""lbfgs_two_loop in Triton: equation (11) in two forms, and the ring of pairs. e bytes per element.

form        launch         programs               reads per program, FLOPs per layer
recursion   `_recursion`   per tile of columns    S and Y twice (4 p n e, from L2), 8 p n columns
compact     `_gram`    per tile of G          [S; Y] [Y; Q']', 4 p n (p + columns)
            `_solve`       per tile of columns    R and Y Y', 6 p^2 columns
            `_apply`       per tile of out        [S; Y]' (v; -u), 4 p n columns

The recursion keeps its columns of Q on chip through all 2p sweeps; each sweep is a sum over all n
rows, one after the other: latency, not work. The compact form has products instead and sums over p
only, but reads S and Y three times and needs 2p (p + 2 columns) numbers of scratch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from kbfgs_ext.ops.bfgs_update.reference import CURVATURE_GATE
from kbfgs_ext.ops.registry import Unsupported
from kbfgs_ext.ops.triton_common import (
    TABLES,
    VECTORS,
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
    real_type,
    root,
    size,
    tile,
    vector,
    warps,
)

# Words of a row: sizes, then matrices with their row stride behind them, vectors, scratch offsets.
N, PAIRS, COLUMNS, S, Y, Q, OUT, PUSHED, RHO, FIRST, SECOND = (
    tl.constexpr(i) for i in (0, 1, 2, 3, 5, 7, 9, 11, 12, 13, 14)
)
COUNTS, S_NEW, Y_NEW, C = (tl.constexpr(i) for i in range(7, 11))  # in `lbfgs_push_`
WORDS = 15
GATE = tl.constexpr(CURVATURE_GATE)
ACCEPTED, REJECTED = tl.constexpr(0), tl.constexpr(1)


@dataclasses.dataclass(frozen=True)
class Recursion:
    """A tile of Q in registers: 8 192 fp32 numbers are 64 registers of each of 128 threads.

    Columns of 1000 (padded to 1024) then go 8 at a time: 99 programs for 785 of them, one wave on
    132 SMs, and S and Y come 99 times from the L2 (158 MB). Longer vectors get more warps, up to
    the 1024 threads of a block.
    """

    elements: int = 8192
    columns: int = 16  # at most
    warps: int = 4
    longest: int = 8 * 8192  # half in fp64


@dataclasses.dataclass(frozen=True)
class Compact:
    """64 x 64 products along 16, as in kron_precondition: along 32 newer Tritons spill. In fp64
    `_gram` takes twice the warps; `_apply` does not, because ptxas then holds it to 128 registers
    and it spills.

    `_solve` has 512 fp32 numbers of u to one warp, because each of its 2p steps is a sum over p:
    shuffles, no barrier; at most 16 columns, because 32 of them spill.
    """

    tile: int = 64
    depth: int = 16
    warps: int = 4
    stages: int = 2
    solve_elements: int = 512
    solve_columns: int = 16


RECURSION, COMPACT = Recursion(), Compact()


@triton.jit
def ring(row, T: tl.constexpr):
    """S, Y, their strides, the rows of the ring, how many hold a pair, and where the oldest is."""
    p, pushed = tl.load(row + PAIRS), tl.load(at(row, PUSHED, tl.int64))
    count = tl.minimum(pushed, p)
    return (
        at(row, S, T),
        tl.load(row + S + 1),
        at(row, Y, T),
        tl.load(row + Y + 1),
        p,
        count,
        (pushed - count),
    )


@triton.jit
def _recursion(
    starts, rows, alphas, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    LENGTH: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, columns = size(row, N), size(row, COLUMNS)
    S_, s_stride, Y_, y_stride, p, count, oldest = ring(row, T)
    rho = at(row, RHO, T)
    i, j = tl.arange(0, LENGTH), block * COLS + tl.arange(0, COLS)
    q = tile(at(row, Q, T), tl.load(row + Q + 1), i, j, n, columns)
    alphas += tl.load(row + FIRST) + j  # alpha of the k-th oldest pair is in row k
    for back in tl.range(0, count):
        k = count - 1 - back
        r = (oldest + k) % p
        s, y = vector(S_ + r * s_stride, i, n), vector(Y_ + r * y_stride, i, n)
        alpha = tl.load(rho + r) * tl.sum(s[:, None] * q, 0)
        q -= y[:, None] * alpha[None, :]
        tl.store(alphas + k * columns, alpha, mask=j < columns)
    tl.debug_barrier()
    for k in tl.range(0, count):
        r = (oldest + k) % p
        s, y = vector(S_ + r * s_stride, i, n), vector(Y_ + r * y_stride, i, n)
        alpha = tl.load(alphas + k * columns, mask=j < columns, other=0.0)
        beta = tl.load(rho + r) * tl.sum(y[:, None] * q, 0)
        q += s[:, None] * (alpha - beta)[None, :]
    out = at(row, OUT, T) + i[:, None] * tl.load(row + OUT + 1) + j[None, :]
    tl.store(out, q, mask=(i < n)[:, None] & (j < columns)[None, :])


@triton.jit
def _gram(
    starts, rows, G, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """G = [S; Y] [Y' Q], 2p x (p + columns); a tile is of S or Y, and of Y' or Q, never of both."""
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, p, columns = size(row, N), size(row, PAIRS), size(row, COLUMNS)
    of_pairs = tl.cdiv(p, TILE)
    across = of_pairs + tl.cdiv(columns, TILE)
    down, along = t // across, t % across
    below = down // of_pairs  # 0: S, 1: Y
    word = S + below * (Y - S)
    left, stride = tl.load(row + word).to(tl.pointer_type(T)), tl.load(row + word + 1)
    a, b = (down % of_pairs) * TILE + tl.arange(0, TILE), along * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), T)
    if along < of_pairs:
        for k0 in tl.range(0, n, DEPTH):
            k = k0 + tl.arange(0, DEPTH)
            y = tl.trans(tile(at(row, Y, T), tl.load(row + Y + 1), b, k, p, n))
            x = tile(left, stride, a, k, p, n)
            total = tl.dot(x, y, total, input_precision="ieee", out_dtype=T)
        width, first = p, 0
    else:
        b -= of_pairs * TILE
        for k0 in tl.range(0, n, DEPTH):
            k = k0 + tl.arange(0, DEPTH)
            q = tile(at(row, Q, T), tl.load(row + Q + 1), k, b, n, columns)
            x = tile(left, stride, a, k, p, n)
            total = tl.dot(x, q, total, input_precision="ieee", out_dtype=T)
        width, first = columns, p
    G += tl.load(row + FIRST) + (below * p + a)[:, None].to(tl.int64) * (p + columns)
    tl.store(G + (first + b)[None, :], total, mask=(a < p)[:, None] & (b < width)[None, :])


@triton.jit
def _solve(
    starts, rows, G, UV, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ALL: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """v = R^-T ((C + Y Y') u - Y Q) and u = R^-1 S Q; index k counts pairs from the oldest."""
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    columns = tl.load(row + COLUMNS)
    _, _, _, _, p, count, oldest = ring(row, T)
    G += tl.load(row + FIRST)
    stride = p + columns
    i, j = tl.arange(0, ALL), block * COLS + tl.arange(0, COLS)
    r = (oldest + i) % p
    used, inside = i < count, (i < count)[:, None] & (j < columns)[None, :]
    SQ = tl.load(G + r[:, None] * stride + (p + j)[None, :], mask=inside, other=0.0)
    YQ = tl.load(G + (p + r)[:, None] * stride + (p + j)[None, :], mask=inside, other=0.0)
    diagonal = tl.load(G + r * stride + r, mask=used, other=1.0)

    rest, u, YYu = SQ, tl.zeros((ALL, COLS), T), tl.zeros((ALL, COLS), T)
    for back in tl.range(0, count):
        k = count - 1 - back
        r_k = (oldest + k) % p
        R_k = tl.load(G + r * stride + r_k, mask=i < k, other=0.0)  # above the diagonal
        YY_k = tl.load(G + (p + r_k) * stride + r, mask=used, other=0.0)
        here = (i == k)[:, None]
        u_k = tl.sum(tl.where(here, divide(rest, diagonal[:, None]), 0.0), 0)[None, :]
        u = tl.where(here, u_k, u)
        rest -= R_k[:, None] * u_k
        YYu += YY_k[:, None] * u_k

    rest, v = diagonal[:, None] * u + YYu - YQ, tl.zeros((ALL, COLS), T)
    for k in tl.range(0, count):
        r_k = (oldest + k) % p
        R_k = tl.load(G + r_k * stride + r, mask=used & (i > k), other=0.0)
        here = (i == k)[:, None]
        v_k = tl.sum(tl.where(here, divide(rest, diagonal[:, None]), 0.0), 0)[None, :]
        v = tl.where(here, v_k, v)
        rest -= R_k[:, None] * v_k

    UV += tl.load(row + SECOND) + r[:, None] * columns + j[None, :]
    tl.store(UV, v, mask=inside)
    tl.store(UV + p * columns, -u, mask=inside)


@triton.jit
def _apply(
    starts, rows, UV, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, p, columns = size(row, N), size(row, PAIRS), size(row, COLUMNS)
    across = tl.cdiv(columns, TILE)
    i, j = (t // across) * TILE + tl.arange(0, TILE), (t % across) * TILE + tl.arange(0, TILE)
    UV += tl.load(row + SECOND)
    filled = tl.minimum(tl.load(at(row, PUSHED, tl.int64)), p).to(tl.int32)
    of_pairs = tl.cdiv(filled, DEPTH)
    total = tl.zeros((TILE, TILE), T)
    for turn in tl.range(0, 2 * of_pairs):
        below = turn // of_pairs  # 0: S and v, 1: Y and -u
        word = S + below * (Y - S)
        pairs, stride = tl.load(row + word).to(tl.pointer_type(T)), tl.load(row + word + 1)
        a = (turn % of_pairs) * DEPTH + tl.arange(0, DEPTH)
        left = tl.trans(tile(pairs, stride, a, i, filled, n))
        right = tile(
            UV + below.to(tl.int64) * p * columns, columns.to(tl.int64), a, j, filled, columns
        )
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=T)
    total += tile(at(row, Q, T), tl.load(row + Q + 1), i, j, n, columns)
    out = at(row, OUT, T) + i[:, None] * tl.load(row + OUT + 1) + j[None, :]
    tl.store(out, total, mask=(i < n)[:, None] & (j < columns)[None, :])


@triton.jit
def _push(
    starts, rows, ok, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    LENGTH: tl.constexpr,
):  # fmt: skip
    entry, _ = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, p, pushed = size(row, N), tl.load(row + PAIRS), at(row, PUSHED, tl.int64)
    s_new, y_new, c, live = at(row, S_NEW, T), at(row, Y_NEW, T), at(row, C, T), flag(ok)
    sy, ss = tl.zeros((LENGTH,), T), tl.zeros((LENGTH,), T)
    yy, cc = tl.zeros((LENGTH,), T), tl.zeros((LENGTH,), T)
    for j0 in tl.range(0, n, LENGTH):
        j = j0 + tl.arange(0, LENGTH)
        s, y, c_j = vector(s_new, j, n), vector(y_new, j, n), vector(c, j, n)
        sy += s * y
        ss += s * s
        yy += y * y
        cc += c_j * c_j
    sy_, ss_, yy_, cc_ = tl.sum(sy, 0), tl.sum(ss, 0), tl.sum(yy, 0), tl.sum(cc, 0)
    rho = divide(number(1.0, T), sy_)
    accept = live & (sy_ > 0) & (sy_ > number(GATE, T) * ss_ * root(cc_))  # (8)
    accept = accept & finite(rho) & finite(ss_) & finite(yy_)  # (8)

    before = tl.load(pushed)
    r = before % p
    for j0 in tl.range(0, n, LENGTH):
        j = j0 + tl.arange(0, LENGTH)
        mask = (j < n) & accept
        tl.store(at(row, S, T) + r * tl.load(row + S + 1) + j, vector(s_new, j, n), mask=mask)
        tl.store(at(row, Y, T) + r * tl.load(row + Y + 1) + j, vector(y_new, j, n), mask=mask)
    tl.store(at(row, RHO, T) + r, rho, mask=accept)
    tl.debug_barrier()  # every warp has read `pushed`, which one thread now writes
    tl.store(pushed, before + accept)
    counts = at(row, COUNTS, tl.int64)
    tl.store(counts + ACCEPTED, tl.load(counts + ACCEPTED) + accept)
    tl.store(counts + REJECTED, tl.load(counts + REJECTED) + (live & ~accept))


def _as_matrix(q: torch.Tensor) -> torch.Tensor:
    return q if q.dim() == 2 else q[:, None]


def lbfgs_two_loop_(out, Q, S, Y, rho, pushed, form) -> None:
    """(11) for all layers: one launch by the recursion, three by the compact form.

    All products are fp32 (or fp64) throughout. "auto" takes the compact form for vectors that the
    recursion cannot hold.
    """
    shapes = [(s.shape[1], s.shape[0], _as_matrix(q).shape[1]) for s, q in zip(S, Q, strict=True)]
    if not any(n * columns for n, _, columns in shapes):
        return
    T, device = real_type(*S), S[0].device
    Q, S, Y = by_rows([_as_matrix(q) for q in Q]), by_rows(S), by_rows(Y)
    longest = triton.next_power_of_2(max(n for n, _, _ in shapes))
    most, limit = max(p for _, p, _ in shapes), RECURSION.longest // warps(1, T)
    compact = form == "compact" or (form == "auto" and longest > limit)
    if not compact and longest > limit:
        raise Unsupported(f"the recursion takes vectors of up to {limit}, got {longest}")
    rows, first, second = [], 0, 0
    for i, (n, p, columns) in enumerate(shapes):
        pairs = (S[i], Y[i], Q[i], _as_matrix(out[i]))
        words = [word for t in pairs for word in matrix(t)]
        rows.append([n, p, columns, *words, pointer(pushed[i]), pointer(rho[i]), first, second])
        first += 2 * p * (p + columns) if compact else p * columns
        second += 2 * p * columns
    scratch = torch.empty(first, dtype=S[0].dtype, device=device)
    if compact:
        solved = torch.empty(second, dtype=S[0].dtype, device=device)
        _launch_compact(shapes, rows, scratch, solved, T, triton.next_power_of_2(most))
        return
    length = max(16, longest)
    cols = min(max(1, RECURSION.elements // length), RECURSION.columns)
    table = TABLES.get(device, rows, [blocks(columns, cols) for _, _, columns in shapes])
    launch(
        _recursion, table.programs[0], table.starts[0], table.rows, scratch, WORDS=WORDS,
        ENTRIES=table.entries, T=T, LENGTH=length, COLS=cols, device=device,
        num_warps=warps(RECURSION.warps * blocks(length * cols, RECURSION.elements), T),
    )  # fmt: skip


def _launch_compact(shapes, rows, G, UV, T, most: int) -> None:
    edge = COMPACT.tile
    cols = min(max(1, COMPACT.solve_elements // (most * warps(1, T))), COMPACT.solve_columns)
    table = TABLES.get(
        G.device, rows,
        [
            2 * blocks(p, edge) * (blocks(p, edge) + blocks(columns, edge))
            for _, p, columns in shapes
        ],
        [blocks(columns, cols) for _, _, columns in shapes],
        [blocks(n, edge) * blocks(columns, edge) for n, _, columns in shapes],
    )  # fmt: skip
    common: dict[str, Any] = dict(WORDS=WORDS, ENTRIES=table.entries, T=T, device=G.device)
    shape: dict[str, Any] = dict(TILE=edge, DEPTH=COMPACT.depth, num_stages=COMPACT.stages)
    launch(
        _gram, table.programs[0], table.starts[0], table.rows, G,
        num_warps=warps(COMPACT.warps, T), **shape, **common,
    )  # fmt: skip
    launch(
        _solve, table.programs[1], table.starts[1], table.rows, G, UV, ALL=most, COLS=cols,
        num_warps=1, **common,
    )  # fmt: skip
    launch(
        _apply, table.programs[2], table.starts[2], table.rows, UV,
        num_warps=COMPACT.warps, **shape, **common,
    )  # fmt: skip


def lbfgs_push_(S, Y, rho, pushed, counts, s, y, c, ok) -> None:
    """(8) and the ring for all layers: one launch."""
    if not S:
        return
    T, device, rows = real_type(*S), S[0].device, []
    s, y, c = by_rows(s), by_rows(y), by_rows(c)
    for i, pairs in enumerate(S):
        p, n = pairs.shape
        new = map(pointer, (counts[i], s[i], y[i], c[i]))
        own = [pointer(pushed[i]), pointer(rho[i])]
        rows.append([n, p, 0, *matrix(pairs), *matrix(Y[i]), *new, *own, 0, 0])
    table = TABLES.get(device, rows, [1] * len(S))
    launch(
        _push, table.programs[0], table.starts[0], table.rows, ok, WORDS=WORDS,
        ENTRIES=table.entries, T=T, LENGTH=VECTORS.length, num_warps=warps(VECTORS.warps, T),
        device=device,
    )  # fmt: skip
