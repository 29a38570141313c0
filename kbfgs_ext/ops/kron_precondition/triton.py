"""kron_precondition in Triton: equations (2) to (4) and (13), the products of all layers grouped.

launch       programs              bytes per layer, e per element               FLOPs
`_left`      per tile of work      H_g, M (with (2) also dW and W) read,        2 n_g^2 n_a
                                   n_g n_a e written
`_right`     per tile of P         work and H_a read, n_g n_a e written;        2 n_g n_a^2
                                   with (2), (4) also dW, W, M read, W, M written
`_slope`     per 16 rows           dW, W, P read, n_g e written                 3 n_g n_a
others       per 16 x 128 tile     each argument read or written once           2 to 4 n_g n_a

`kron_step_` is two launches. `_left` forms the new M while loading it, and stores nothing: other
programs still need the old M and W. `_right` forms it once more for its own tile, which no other
program touches, stores it, takes the step and leaves the old weights in P. Operands are read once
per tile of the other side, n/64 times, through the L2 (all of them together are some 25 MB in the
MNIST autoencoder, an H100's L2 has 50).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl

from kbfgs_ext.ops.autotune import choose
from kbfgs_ext.ops.triton_common import (
    TABLES,
    at,
    blocks,
    by_rows,
    flag,
    input_type,
    launch,
    locate,
    matrix,
    number,
    operand_type,
    pointer,
    precision,
    real_type,
    size,
    tile,
)

# Words of a layer's row: sizes, then pointers, each matrix with its row stride behind it.
N_G, N_A, D_IN, MOMENTUM, P, WORK, W, DW, H_G, H_A, B, DB, STEP, SLOPE = (
    tl.constexpr(i) for i in (0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 18, 19, 20)
)
WORDS = 21


@dataclasses.dataclass(frozen=True)
class Product:
    """Tiles of 64 x 64 along 16 at a time.

    The MNIST autoencoder then has 744 tiles for 132 SMs; 128 x 128 would leave it 196, and its
    narrow layers almost empty ones. Eight warps and a depth of 16, because the fused product has
    the addresses of five operands in registers: with four warps, or a depth of 32, it spills.
    """

    tile: int = 64
    depth: int = 16
    warps: int = 8
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """16 x 128: whole 512-byte lines in fp32, 16 independent loads per thread and argument."""

    rows: int = 16
    cols: int = 128
    warps: int = 4


# The first is taken unless KBFGS_AUTOTUNE=1 (autotune.py) finds another faster.
PRODUCTS = (Product(), Product(tile=128, stages=3), Product(tile=32, depth=32, warps=4))
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
def _left(
    starts, rows, ok, mu: tl.float64, decay: tl.float64, FUSED: tl.constexpr,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, WT: tl.constexpr, GT: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a = size(row, N_G), size(row, N_A)
    i, j = place(row, t, TILE, TILE)
    total = tl.zeros((TILE, TILE), T)
    for k0 in tl.range(0, tl.where(flag(ok), n_g, 0), DEPTH):  # a void step needs no direction
        k = k0 + tl.arange(0, DEPTH)
        h = tile_of(row, H_G, i, k, n_g, n_g, T)
        if FUSED:
            m = new_M(row, k, j, mu, decay, WT, GT, T)  # (2)
        else:
            m = tile_of(row, MOMENTUM, k, j, n_g, n_a, T)
        total = tl.dot(h.to(OPERAND), m.to(OPERAND), total, input_precision=PRECISION, out_dtype=T)
    work = at(row, WORK, T) + i[:, None] * tl.load(row + WORK + 1) + j[None, :]
    tl.store(work, total, mask=(i < n_g)[:, None] & (j < n_a)[None, :])


@triton.jit
def _right(
    starts, rows, ok, mu: tl.float64, decay: tl.float64, FUSED: tl.constexpr, LEFT: tl.constexpr,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, WT: tl.constexpr, GT: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a, live = size(row, N_G), size(row, N_A), flag(ok)
    i, j = place(row, t, TILE, TILE)
    total = tl.zeros((TILE, TILE), T)
    for k0 in tl.range(0, tl.where(live, n_a, 0), DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        left = tile_of(row, LEFT, i, k, n_g, n_a, T)
        h = tile_of(row, H_A, k, j, n_a, n_a, T)
        total = tl.dot(
            left.to(OPERAND), h.to(OPERAND), total, input_precision=PRECISION, out_dtype=T
        )  # (3)
    inside = (i < n_g)[:, None] & (j < n_a)[None, :]
    if FUSED:
        m = new_M(row, i, j, mu, decay, WT, GT, T)  # (2), before W changes
        tl.store(
            at(row, MOMENTUM, T) + i[:, None] * tl.load(row + MOMENTUM + 1) + j[None, :],
            m,
            inside & live,
        )
        total = step(row, total, i, j, live, WT, T)  # (4)
    tl.store(at(row, P, T) + i[:, None] * tl.load(row + P + 1) + j[None, :], total, mask=inside)


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
    tl.store(at(row, SLOPE, T) + i, tl.sum(total, 1), mask=i < n_g)


_NONE = (0, 0)  # a matrix that the op does not have


def _table(like, TILE, TILE_COLS, H_g=(), H_a=(), M=(), P=(), work=(), W=(), b=(), dW=(), db=(),
           step_size=(), slope=()):  # fmt: skip
    """The layers' rows, with a launch by tiles of ``like`` (n_g x n_a each)."""
    rows, tiles = [], []
    for i, model in enumerate(like):
        n_g, n_a = model.shape
        pairs = [matrix(t[i]) if t else _NONE for t in (M, P, work, W, dW, H_g, H_a)]
        singles = [pointer(t[i]) if t else 0 for t in (b, db, step_size, slope)]
        d_in = W[i].shape[1] if W else n_a
        rows.append([n_g, n_a, d_in, *(word for pair in pairs for word in pair), *singles])
        tiles.append(blocks(n_g, TILE) * blocks(n_a, TILE_COLS))
    return TABLES.get(like[0].device, rows, tiles)


def _by_products(kernel, product, table, device, **constants) -> None:
    T = constants["T"]
    launch(
        kernel, table.programs[0], table.starts[0], table.rows, WORDS=WORDS, ENTRIES=table.entries,
        PRECISION=precision(T, device), OPERAND=operand_type(T, T, device),
        TILE=product.tile, DEPTH=product.depth, num_warps=product.warps,
        num_stages=product.stages, device=device, **constants,
    )  # fmt: skip


def _by_elements(kernel, like, scalars, constants, **tensors) -> None:
    table = _table(like, ELEMENTWISE.rows, ELEMENTWISE.cols, **tensors)
    _launch(kernel, ELEMENTWISE, table, like, scalars, constants)


def _by_row_blocks(kernel, like, constants, **tensors) -> None:
    table = _table(like, ROW_SUMS.rows, max(t.shape[1] for t in like), **tensors)
    _launch(kernel, ROW_SUMS, table, like, (), constants)


def _launch(kernel, shape: Elementwise, table, like, scalars, constants) -> None:
    launch(
        kernel, table.programs[0], table.starts[0], table.rows, *scalars, WORDS=WORDS,
        ENTRIES=table.entries, ROWS=shape.rows, COLS=shape.cols,
        num_warps=shape.warps, device=like[0].device, **constants,
    )  # fmt: skip


def _shared(work) -> bool:
    """Whether layers share their scratch, as they may on the CPU: then they go one by one."""
    return len({w.data_ptr() for w in work}) < len(work)


def kron_precondition_(P, H_g, M, H_a, work) -> None:
    """(3) for all layers: two launches, or one without H_g.

    fp32 products are fp32 throughout, unless `torch.set_float32_matmul_precision` allows TF32
    ("high") or bf16 operands ("medium"); sums are fp32.
    """
    if H_g and _shared(work):
        for i in range(len(P)):
            part = slice(i, i + 1)
            kron_precondition_(P[part], H_g[part], M[part], H_a[part], work[part])
        return
    if not P:
        return
    args = (P, by_rows(H_g), by_rows(M), by_rows(H_a), work)
    _precondition(choose("kron_precondition_", PRODUCTS, _precondition, args), *args)


def _precondition(product: Product, P, H_g, M, H_a, work) -> None:
    T = real_type(*P)
    table = _table(P, product.tile, product.tile, H_g, H_a, M, P, work if H_g else ())
    plain = dict(ok=None, mu=0.0, decay=0.0, FUSED=False, T=T, WT=T, GT=T)
    if H_g:
        _by_products(_left, product, table, P[0].device, **plain)
    _by_products(
        _right, product, table, P[0].device, LEFT=(WORK if H_g else MOMENTUM).value, **plain
    )


def momentum_(M, dW, db, W, b, momentum, weight_decay, ok) -> None:
    """(2) for all layers: one launch."""
    if not M:
        return
    dW, db, W, b = by_rows(dW), by_rows(db), by_rows(W), by_rows(b)
    constants = dict(T=real_type(*M), WT=input_type([*W, *b]), GT=input_type([*dW, *db]))
    scalars = (ok, momentum, weight_decay)
    _by_elements(_momentum, M, scalars, constants, M=M, dW=dW, db=db, W=W, b=b)


def descend_(W, b, P, step_size, ok) -> None:
    """(4) for all layers: one launch."""
    if not P:
        return
    constants = dict(T=real_type(*P), WT=input_type([*W, *b]))
    _by_elements(_descend, P, (ok,), constants, P=P, W=W, b=b, step_size=step_size)


def slope_(slope, W, b, saved, dW, db) -> None:
    """(13) for all layers: one launch."""
    if not saved:
        return
    dW, db, W, b, saved = by_rows(dW), by_rows(db), by_rows(W), by_rows(b), by_rows(saved)
    constants = dict(
        T=real_type(*saved, *slope), WT=input_type([*W, *b]), GT=input_type([*dW, *db])
    )
    _by_row_blocks(_slope, saved, constants, P=saved, W=W, b=b, dW=dW, db=db, slope=slope)


def restore_(W, b, saved, undo) -> None:
    """The weights of before for all layers: one launch."""
    if not saved:
        return
    saved = by_rows(saved)
    constants = dict(T=real_type(*saved), WT=input_type([*W, *b]))
    _by_elements(_restore, saved, (undo,), constants, P=saved, W=W, b=b)


def kron_step_(
    W, b, M, P, work, dW, db, H_g, H_a, step_size, momentum, weight_decay, ok
) -> None:  # fmt: skip
    """(2), (3), (4) for all layers: two launches. Precision as in `kron_precondition_`."""
    if _shared(work):
        lists = (W, b, M, P, work, dW, db, H_g, H_a, step_size)
        for i in range(len(W)):
            one = [given[i : i + 1] for given in lists]
            kron_step_(*one, momentum, weight_decay, ok)  # type: ignore[call-arg]
        return
    if not P:
        return
    dW, db, H_g, H_a = by_rows(dW), by_rows(db), by_rows(H_g), by_rows(H_a)
    args = (W, b, M, P, work, dW, db, H_g, H_a, step_size, momentum, weight_decay, ok)
    _step(choose("kron_step_", PRODUCTS, _step, args), *args)


def _step(
    product: Product, W, b, M, P, work, dW, db, H_g, H_a, step_size, momentum, weight_decay, ok
) -> None:  # fmt: skip
    table = _table(P, product.tile, product.tile, H_g, H_a, M, P, work, W, b, dW, db, step_size)
    types: dict[str, Any] = dict(
        T=real_type(*M, *P), WT=input_type([*W, *b]), GT=input_type([*dW, *db])
    )
    fused = dict(ok=ok, mu=momentum, decay=weight_decay, FUSED=True, **types)
    _by_products(_left, product, table, P[0].device, **fused)
    _by_products(_right, product, table, P[0].device, LEFT=WORK.value, **fused)
