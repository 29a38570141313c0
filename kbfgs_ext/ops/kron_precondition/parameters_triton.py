"""The ops around kron_precondition's products in Triton: (2), (4), (13) and (15) of ../README.md.

launch            programs              bytes per layer, e per element               FLOPs
`_slope`          per 16 rows           dW, W, P read, n_g e written                 3 n_g n_a
`_output_change`  per 16 rows           W, P read, n_g e written                     6 n_g n_a
others            per 16 x 128 tile     each argument read or written once           2 to 4 n_g n_a

The layers' rows and what is loaded and stored by them are shared with the products (triton.py).
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

from kbfgs_ext.ops.triton_common import (
    TABLES,
    alike,
    at,
    blocks,
    by_rows,
    flag,
    input_type,
    launch,
    locate,
    matrix,
    number,
    pointer,
    real_type,
    size,
    tile,
    vector,
)

# Words of a layer's row: sizes, then pointers, each matrix with its row stride behind it.
N_G, N_A, D_IN, MOMENTUM, P, WORK, W, DW, H_G, H_A, B, DB, STEP, SUMS, A_BAR, A_BAR_NEXT = (
    tl.constexpr(i) for i in (0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 18, 19, 20, 21, 22)
)
WORDS = 23


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """16 x 128: whole 512-byte lines in fp32, 16 independent loads per thread and argument."""

    rows: int = 16
    cols: int = 128
    warps: int = 4


ELEMENTWISE = Elementwise()
ROW_SUMS = Elementwise(cols=64)  # the sums take registers too: with 128 columns float64 spills


@triton.jit
def tile_of(row, WORD: tl.constexpr, i, j, n_rows, n_cols, T: tl.constexpr):
    """A tile of the matrix whose pointer and stride are at WORD."""
    return tile(at(row, WORD, T), tl.load(row + WORD + 1), i, j, n_rows, n_cols)


@triton.jit
def joined(row, WEIGHT: tl.constexpr, BIAS: tl.constexpr, i, j, WT: tl.constexpr, T: tl.constexpr):
    """[W, b][i, j] in T, zero outside."""
    n_g, n_a, d_in = size(row, N_G), size(row, N_A), size(row, D_IN)
    weight = tile_of(row, WEIGHT, i, j, n_g, d_in, WT).to(T)
    bias = tl.load(at(row, BIAS, WT) + i, mask=(i < n_g) & (d_in < n_a), other=0.0).to(T)
    return tl.where((j == d_in)[None, :], bias[:, None], weight)


@triton.jit
def store_joined(row, new, i, j, keep, WT: tl.constexpr):
    """[W, b][i, j] = new where ``keep``."""
    n_g, n_a, d_in = size(row, N_G), size(row, N_A), size(row, D_IN)
    inside = (i < n_g)[:, None] & (j < n_a)[None, :] & keep
    is_bias = (j == d_in)[None, :]
    weight = at(row, W, WT) + i[:, None] * tl.load(row + W + 1) + j[None, :]
    tl.store(weight, new.to(WT), mask=inside & ~is_bias)
    bias = at(row, B, WT) + i[:, None] + tl.zeros_like(j)[None, :]
    tl.store(bias, new.to(WT), mask=inside & is_bias)


@triton.jit
def new_M(row, i, j, mu, decay, WT: tl.constexpr, GT: tl.constexpr, T: tl.constexpr):
    """(2): the new M[i, j]."""
    D = joined(row, DW, DB, i, j, GT, T) + number(decay, T) * joined(row, W, B, i, j, WT, T)
    old = tile_of(row, MOMENTUM, i, j, size(row, N_G), size(row, N_A), T)
    return number(mu, T) * old + number(1 - mu, T) * D


@triton.jit
def place(row, t, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns of the ``t``-th tile of an n_g x n_a matrix."""
    across = tl.cdiv(size(row, N_A), COLS)
    i, j = (t // across) * ROWS, (t % across) * COLS
    return i + tl.arange(0, ROWS), j + tl.arange(0, COLS)


@triton.jit
def step(row, direction, i, j, live, WT: tl.constexpr, T: tl.constexpr):
    """(4) on a tile, where ``live``; returns the weights of before."""
    before = joined(row, W, B, i, j, WT, T)
    step_size = tl.load(at(row, STEP, tl.float64)).to(T)
    store_joined(row, before - step_size * direction, i, j, live, WT)
    return before


@triton.jit
def _momentum(
    starts, rows, ok, mu: tl.float64, decay: tl.float64,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, WT: tl.constexpr, GT: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    i, j = place(row, t, ROWS, COLS)
    m = new_M(row, i, j, mu, decay, WT, GT, T)  # (2)
    inside = (i < size(row, N_G))[:, None] & (j < size(row, N_A))[None, :] & flag(ok)
    tl.store(
        at(row, MOMENTUM, T) + i[:, None] * tl.load(row + MOMENTUM + 1) + j[None, :], m, mask=inside
    )


@triton.jit
def _descend(
    starts, rows, ok, WORDS: tl.constexpr, ENTRIES: tl.constexpr, WT: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a = size(row, N_G), size(row, N_A)
    i, j = place(row, t, ROWS, COLS)
    before = step(row, tile_of(row, P, i, j, n_g, n_a, T), i, j, flag(ok), WT, T)  # (4)
    inside = (i < n_g)[:, None] & (j < n_a)[None, :]
    tl.store(at(row, P, T) + i[:, None] * tl.load(row + P + 1) + j[None, :], before, mask=inside)


@triton.jit
def _restore(
    starts, rows, undo, WORDS: tl.constexpr, ENTRIES: tl.constexpr, WT: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    i, j = place(row, t, ROWS, COLS)
    saved = tile_of(row, P, i, j, size(row, N_G), size(row, N_A), T)
    store_joined(row, saved, i, j, flag(undo), WT)


@triton.jit
def _slope(
    starts, rows, WORDS: tl.constexpr, ENTRIES: tl.constexpr, WT: tl.constexpr, GT: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a = size(row, N_G), size(row, N_A)
    i = t * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLS), T)
    for j0 in tl.range(0, n_a, COLS):
        j = j0 + tl.arange(0, COLS)
        moved = joined(row, W, B, i, j, WT, T) - tile_of(row, P, i, j, n_g, n_a, T)
        total += joined(row, DW, DB, i, j, GT, T) * moved  # (13)
    tl.store(at(row, SUMS, T) + i, tl.sum(total, 1), mask=i < n_g)


@triton.jit
def _output_change(
    starts, rows, WORDS: tl.constexpr, ENTRIES: tl.constexpr, WT: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a = size(row, N_G), size(row, N_A)
    i = t * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLS), T)
    for j0 in tl.range(0, n_a, COLS):
        j = j0 + tl.arange(0, COLS)
        before = tile_of(row, P, i, j, n_g, n_a, T)
        a_bar_next = vector(at(row, A_BAR_NEXT, T), j, n_a)
        fed = a_bar_next - vector(at(row, A_BAR, T), j, n_a)
        moved = joined(row, W, B, i, j, WT, T) - before
        total += moved * a_bar_next[None, :] + before * fed[None, :]  # (15)
    tl.store(at(row, SUMS, T) + i, tl.sum(total, 1), mask=i < n_g)


_NONE = (0, 0)  # a matrix that the op does not have


def table_of(like, TILE, TILE_COLS, H_g=(), H_a=(), M=(), P=(), work=(), W=(), b=(), dW=(), db=(),
             step_size=(), sums=(), a_bar=(), a_bar_next=()):  # fmt: skip
    """The layers' rows, with a launch by tiles of ``like`` (n_g x n_a each)."""
    rows, tiles = [], []
    for i, model in enumerate(like):
        n_g, n_a = model.shape
        pairs = [matrix(t[i]) if t else _NONE for t in (M, P, work, W, dW, H_g, H_a)]
        vectors = (b, db, step_size, sums, a_bar, a_bar_next)
        singles = [pointer(t[i]) if t else 0 for t in vectors]
        d_in = W[i].shape[1] if W else n_a
        rows.append([n_g, n_a, d_in, *(word for pair in pairs for word in pair), *singles])
        tiles.append(blocks(n_g, TILE) * blocks(n_a, TILE_COLS))
    return TABLES.get(like[0].device, rows, tiles)


def _by_elements(kernel, like, scalars, constants, **tensors) -> None:
    table = table_of(like, ELEMENTWISE.rows, ELEMENTWISE.cols, **tensors)
    _launch(kernel, ELEMENTWISE, table, like, scalars, constants)


def _by_row_blocks(kernel, like, constants, **tensors) -> None:
    table = table_of(like, ROW_SUMS.rows, max(t.shape[1] for t in like), **tensors)
    _launch(kernel, ROW_SUMS, table, like, (), constants)


def _launch(kernel, shape: Elementwise, table, like, scalars, constants) -> None:
    launch(
        kernel, table.programs[0], table.starts[0], table.rows, *scalars, WORDS=WORDS,
        ENTRIES=table.entries, ROWS=shape.rows, COLS=shape.cols,
        num_warps=shape.warps, device=like[0].device, **constants,
    )  # fmt: skip


@alike("W", "b", "dW", "db")
def momentum_(M, dW, db, W, b, momentum, weight_decay, ok) -> None:
    """(2) for all layers: one launch."""
    if not M:
        return
    dW, db, W, b = by_rows(dW), by_rows(db), by_rows(W), by_rows(b)
    constants = dict(T=real_type(*M), WT=input_type([*W, *b]), GT=input_type([*dW, *db]))
    scalars = (ok, momentum, weight_decay)
    _by_elements(_momentum, M, scalars, constants, M=M, dW=dW, db=db, W=W, b=b)


@alike("W", "b")
def descend_(W, b, P, step_size, ok) -> None:
    """(4) for all layers: one launch."""
    if not P:
        return
    constants = dict(T=real_type(*P), WT=input_type([*W, *b]))
    _by_elements(_descend, P, (ok,), constants, P=P, W=W, b=b, step_size=step_size)


@alike("W", "b", "dW", "db")
def slope_(slope, W, b, saved, dW, db) -> None:
    """(13) for all layers: one launch."""
    if not saved:
        return
    dW, db, W, b, saved = by_rows(dW), by_rows(db), by_rows(W), by_rows(b), by_rows(saved)
    constants = dict(
        T=real_type(*saved, *slope), WT=input_type([*W, *b]), GT=input_type([*dW, *db])
    )
    _by_row_blocks(_slope, saved, constants, P=saved, W=W, b=b, dW=dW, db=db, sums=slope)


@alike("W", "b")
def output_change_(change, W, b, saved, a_bar, a_bar_next) -> None:
    """(15) for all layers: one launch."""
    if not saved:
        return
    W, b, saved = by_rows(W), by_rows(b), by_rows(saved)
    means = dict(a_bar=by_rows(a_bar), a_bar_next=by_rows(a_bar_next))
    constants = dict(T=real_type(*saved, *change, *a_bar, *a_bar_next), WT=input_type([*W, *b]))
    _by_row_blocks(_output_change, saved, constants, P=saved, W=W, b=b, sums=change, **means)


@alike("W", "b")
def restore_(W, b, saved, undo) -> None:
    """The weights of before for all layers: one launch."""
    if not saved:
        return
    saved = by_rows(saved)
    constants = dict(T=real_type(*saved), WT=input_type([*W, *b]))
    _by_elements(_restore, saved, (undo,), constants, P=saved, W=W, b=b)
