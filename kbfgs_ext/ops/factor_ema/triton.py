"""factor_ema in Triton: equations (1) and (10), with e bytes per element.

launch        programs           bytes per layer                            FLOPs
`_columns`    per 32 columns     m d_in e read (from memory)                3 m n_a
`_squares`    per tile of A      n_a^2 e/2 read, n_a^2 e written, and       m n_a^2
                                 m n_a^2/64 e of X read through the L2
`_partials`   per 32 rows of X   m d_in e read twice, the second time       4 m n_a
                                 from cache; m n_a e/32 written
`_gather`     per 16 rows of y   m n_a e/32 read                            m n_a/32

`_squares` makes the tiles of X~'X~ on and below the diagonal and writes each to both places: half
the products. The column of ones is put in while loading, so the bias row and column cost nothing.
Whether A may change at all is known only when every column has been seen (one bad column keeps all
of A), so the columns come first in a launch of their own, which leaves X in the L2 for the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kbfgs_ext.ops.autotune import choose
from kbfgs_ext.ops.triton_common import (
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
    input_type,
    launch,
    locate,
    matrix,
    number,
    operand_type,
    pointer,
    real_type,
    size,
    store_both,
    tile,
    triangle,
    vector,
    warps,
)

# Words of a row beside those of a pair: here H is A and C is a_bar.
X, LD_X, M, D_IN = (tl.constexpr(i) for i in range(10, 14))
PART = tl.constexpr(14)  # where the layer's partial products begin
WORDS = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """X~'X~ by tiles of 64 x 64, along 16 rows of X at a time.

    The MNIST autoencoder then has 456 tiles for 132 SMs; 128 x 128 would leave it 127. Eight warps,
    because with four the addresses of the tile and of its mirror spill.
    """

    tile: int = 64
    rows: int = 16
    warps: int = 8
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class Columns:
    """Column sums: 32 columns are one 128-byte line per row in fp32, 64 rows 8 KB in flight."""

    cols: int = 32
    rows: int = 64
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Rows:
    """X~'(X~ s): 32 rows of X to a program, so that partial results are 1/32 of X.

    A batch of 1000 gives 32 programs per layer; 32 x 1000 fp32 are 125 KB, which an H100's L1 or
    else its L2 still has when the program walks along them for the second time.
    """

    rows: int = 32
    cols: int = 128
    warps: int = 8


# The first is taken unless KBFGS_AUTOTUNE=1 (autotune.py) finds another faster.
TILES = (Tiles(), Tiles(tile=128, rows=32), Tiles(tile=32, rows=32, warps=4))
COLUMNS, ROWS_OF_X = Columns(), Rows()


@triton.jit
def tile_of_X(row, r, j, XT: tl.constexpr, T: tl.constexpr):
    """X~[r, j] in T: zero outside, and the implied column of ones."""
    m, d_in, n = size(row, M), size(row, D_IN), size(row, N)
    x = tile(at(row, X, XT), tl.load(row + LD_X), r, j, m, d_in).to(T)
    ones = (r < m)[:, None] & ((j >= d_in) & (j < n))[None, :]
    return tl.where(ones, tl.full((), 1.0, tl.float32).to(T), x)


@triton.jit
def _columns(
    starts, rows, bad, WORDS: tl.constexpr, ENTRIES: tl.constexpr, XT: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, m = size(row, N), size(row, M)
    j = block * COLS + tl.arange(0, COLS)
    total, squares = tl.zeros((ROWS, COLS), T), tl.zeros((ROWS, COLS), T)
    for r0 in tl.range(0, m, ROWS):
        x = tile_of_X(row, r0 + tl.arange(0, ROWS), j, XT, T)
        total += x
        squares += x * x
    tl.store(at(row, C, T) + j, divide(tl.sum(total, 0), m.to(T)), mask=j < n)  # (1)
    is_bad = (~finite(tl.sum(squares, 0))).to(tl.int32)
    tl.store(bad + tl.program_id(0), tl.max(is_bad, 0))


@triton.jit
def _squares(
    starts, column_starts, rows, bad, ok, decay: tl.float64,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, XT: tl.constexpr, OPERAND: tl.constexpr,
    T: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n, m = size(row, N), size(row, M)
    part = tl.arange(0, PARTS)
    mine = tl.load(column_starts + entry) + part
    any_bad = tl.max(tl.load(bad + mine, mask=part < tl.cdiv(n, COLS), other=0), 0)
    keep = flag(ok) & (any_bad == 0)

    block_i, block_j = triangle(t)
    i, j = block_i * TILE + tl.arange(0, TILE), block_j * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), T)
    for r0 in tl.range(0, tl.where(keep, m, 0), ROWS):
        r = r0 + tl.arange(0, ROWS)
        x_i, x_j = tile_of_X(row, r, i, XT, OPERAND), tile_of_X(row, r, j, XT, OPERAND)
        total = tl.dot(tl.trans(x_i), x_j, total, input_precision="ieee", out_dtype=T)
    A, stride = at(row, H, T), tl.load(row + LD_H)
    old = tile(A, stride, i, j, n, n)
    new = number(decay, T) * old + divide(number(1 - decay, T) * total, m.to(T))  # (1)
    store_both(A, stride, i, j, n, new, keep)


@triton.jit
def _partials(
    starts, rows, parts, WORDS: tl.constexpr, ENTRIES: tl.constexpr, XT: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n = size(row, N)
    r = block * ROWS + tl.arange(0, ROWS)
    Xs = tl.zeros((ROWS, COLS), T)
    for j0 in tl.range(0, n, COLS):
        j = j0 + tl.arange(0, COLS)
        Xs += tile_of_X(row, r, j, XT, T) * vector(at(row, S, T), j, n)[None, :]
    z = tl.sum(Xs, 1)
    parts += tl.load(row + PART) + block.to(tl.int64) * n
    for j0 in tl.range(0, n, COLS):
        j = j0 + tl.arange(0, COLS)
        tl.store(parts + j, tl.sum(tile_of_X(row, r, j, XT, T) * z[:, None], 0), mask=j < n)


@triton.jit
def gathered(row, parts, i, n, T: tl.constexpr, ROWS: tl.constexpr, X_ROWS: tl.constexpr):
    """Elements ``i`` of X~'(X~ s)/m, from the partial products."""
    m = size(row, M)
    count = tl.cdiv(m, X_ROWS)
    parts += tl.load(row + PART)
    total = tl.zeros((32, ROWS), T)
    for b0 in tl.range(0, count, 32):
        b = b0 + tl.arange(0, 32)
        total += tile(parts, n.to(tl.int64), b, i, count, n)
    return divide(tl.sum(total, 0), m.to(T))


@triton.jit
def _gather(
    starts, rows, parts, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, X_ROWS: tl.constexpr,
):  # fmt: skip
    entry, block = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n = size(row, N)
    i = block * ROWS + tl.arange(0, ROWS)
    lam = tl.load(at(row, LAM, tl.float64)).to(T)
    y = gathered(row, parts, i, n, T, ROWS, X_ROWS) + lam * vector(at(row, S, T), i, n)
    tl.store(at(row, Y, T) + i, y, mask=i < n)  # (10)


def words_of_X(x: torch.Tensor) -> list[int]:
    """The words X, LD_X, M and D_IN."""
    return [*matrix(x), *x.shape]


def row_blocks_of_X(X: Sequence[torch.Tensor]) -> list[int]:
    """Programs of `_partials` for each layer."""
    return [blocks(x.shape[0], ROWS_OF_X.rows) for x in X]


def launch_partials(table, at_launch: int, parts: torch.Tensor, X, words: int, T) -> None:
    """`_partials` on a table with this file's words, as its launch number ``at_launch``."""
    launch(
        _partials, table.programs[at_launch], table.starts[at_launch], table.rows, parts,
        WORDS=words, ENTRIES=table.entries, XT=input_type(X), T=T, ROWS=ROWS_OF_X.rows,
        COLS=ROWS_OF_X.cols, num_warps=warps(ROWS_OF_X.warps, T), device=parts.device,
    )  # fmt: skip


@alike("X")
def factor_ema_(A, a_bar, X, decay, ok) -> None:
    """(1) for all layers: two launches, or one for the means alone.

    Products of fp32 are fp32, unless `torch.set_float32_matmul_precision` allows bf16 operands
    ("medium"); sums are fp32. TF32 is not faster: tensor cores want its operands along the sum,
    which is over the rows of X.
    """
    if not X:
        return
    args = (A, a_bar, by_rows(X), decay, ok)
    tiles = choose("factor_ema_", TILES, _factor_ema, args)
    _factor_ema(tiles, *args)


def _factor_ema(tiles: Tiles, A, a_bar, X, decay, ok) -> None:
    T, XT, device = real_type(*a_bar), input_type(X), X[0].device
    sizes = [mean.shape[0] for mean in a_bar]
    rows = []
    for i, n in enumerate(sizes):
        factor = matrix(A[i]) if A else (0, 0)
        rows.append([n, *factor, 0, 0, 0, pointer(a_bar[i]), 0, 0, 0, *words_of_X(X[i]), 0, 0])
    by_columns = [blocks(n, COLUMNS.cols) for n in sizes]
    by_tiles = [b * (b + 1) // 2 for b in (blocks(n, tiles.tile) for n in sizes)]
    table = TABLES.get(device, rows, by_columns, by_tiles)
    bad = torch.empty(table.programs[0], dtype=torch.int32, device=device)
    common: dict[str, Any] = dict(
        WORDS=WORDS, ENTRIES=table.entries, XT=XT, T=T, COLS=COLUMNS.cols, device=device
    )
    launch(
        _columns, table.programs[0], table.starts[0], table.rows, bad, ROWS=COLUMNS.rows,
        num_warps=COLUMNS.warps, **common,
    )  # fmt: skip
    if A:
        launch(
            _squares, table.programs[1], table.starts[1], table.starts[0], table.rows, bad, ok,
            decay, OPERAND=operand_type(XT, T, device), TILE=tiles.tile, ROWS=tiles.rows,
            PARTS=triton.next_power_of_2(max(by_columns)), num_warps=warps(tiles.warps, T),
            num_stages=tiles.stages, **common,
        )  # fmt: skip


@alike("X")
def hessian_action_(y, X, s, lam) -> None:
    """(10) for all layers: two launches."""
    if not X:
        return
    X, s = by_rows(X), by_rows(s)
    T, device = real_type(*s), X[0].device
    x_rows, rows, parts = row_blocks_of_X(X), [], 0
    for i, v in enumerate(s):
        n = v.shape[0]
        vectors = [pointer(v), pointer(y[i]), 0, 0, 0, pointer(lam[i]), 0]
        rows.append([n, 0, 0, *vectors, *words_of_X(X[i]), parts, 0])
        parts += x_rows[i] * n
    table = TABLES.get(device, rows, x_rows, [blocks(v.shape[0], VECTORS.rows) for v in s])
    scratch = torch.empty(parts, dtype=s[0].dtype, device=device)
    launch_partials(table, 0, scratch, X, WORDS, T)
    launch(
        _gather, table.programs[1], table.starts[1], table.rows, scratch, WORDS=WORDS,
        ENTRIES=table.entries, T=T, ROWS=VECTORS.rows, X_ROWS=ROWS_OF_X.rows,
        num_warps=VECTORS.warps, device=device,
    )  # fmt: skip
