"""spectral in Triton: equations (16) to (19), the products of all layers grouped.

launch        programs                  reads and writes per layer, in elements   FLOPs
`_largest`    per 32 x 128 tile of P    n_g n_a read                              n_g n_a
`_scaled`     the same                  n_g n_a read and written                  n_g n_a
`_gram`       per tile of G's lower     n k read n/64 times through the L2,       k^2 n
              triangle                  k^2 written
`_product`    per tile of a product's   operands k/64 times through the L2,       k^3
              lower triangle, or two's  k^2 written                               each
`_normalise`  per 32 x 128 tile of G    k^2 read and written                      2 k^2
`_finish`     per tile of P             Z and X n/64 times, n_g n_a written       2 k^2 n

k = min(n_g, n_a), n = max. Of symmetric matrices that commute the product is symmetric: tiles on
and below the diagonal are made, and stored in both places. R = a*I + b*G + c*G^2 is formed while
loading it. An iteration is three launches (G^2; R G and R Z; R (R G)), the last is two: 3t + 4.
X is kept k x n, whichever side of P is the shorter.

In the work k and n are rounded up to `api.MULTIPLE`, so that rows begin on 16 bytes and are
copied so to shared memory. What is added is 0 in X, so that G, R and Z are block-diagonal: whatever
stands in their second block meets zeros of X alone. Tensor cores want both operands of a TF32
product along the sum: symmetric matrices are so either way, and of X both X and X' are kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from kbfgs_ext.ops.autotune import choose
from kbfgs_ext.ops.registry import Unsupported
from kbfgs_ext.ops.spectral.api import MULTIPLE, rounded_up
from kbfgs_ext.ops.triton_common import (
    TABLES,
    at,
    blocks,
    divide,
    finite,
    launch,
    locate,
    matrix,
    number,
    operand_type,
    pointer,
    precision,
    real_type,
    size,
    store_both,
    tile,
    triangle,
    warps,
)

# Words of a row: sizes, P with its row stride, the work, where its partial sums are, and k and n
# rounded up.
N_G, N_A, K, P, LD_P, WORK, MOST, SUMS, K_UP, N_UP = (tl.constexpr(i) for i in range(10))
WORDS = 10
UNIT = tl.constexpr(MULTIPLE)
# The work holds five k x k matrices, number 0 the Gram matrix, and behind them X and X'.
X_PLACE = tl.constexpr(5)


@dataclasses.dataclass(frozen=True)
class Product:
    """Tiles of 64 x 64 along 32 at a time, 4 warps: one warp group, as tensor cores want it.

    The fastest of eight on an H100 for the MNIST autoencoder: 0.38 ms in TF32, 0.75 in three.
    """

    tile: int = 64
    depth: int = 32
    warps: int = 4
    stages: int = 3


PRODUCTS = (Product(), Product(tile=128), Product(tile=32))


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """32 x 128: whole 512-byte lines in fp32."""

    rows: int = 32
    cols: int = 128
    warps: int = 8


ELEMENTWISE = Elementwise()


@triton.jit
def rounded(row, WORD: tl.constexpr):
    """k or n, rounded up: Triton is told, at the load itself, and copies 16 bytes at a time."""
    return tl.multiple_of(tl.load(row + WORD).to(tl.int32), UNIT)


@triton.jit
def place_of(row, PLACE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    """The PLACE-th matrix of the work."""
    work, k = tl.load(row + WORK).to(tl.pointer_type(T)), rounded(row, K_UP).to(tl.int64)
    if ALIGNED:
        work = tl.multiple_of(work, 16)
    return work + PLACE * k * k


@triton.jit
def tile_at(row, t, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns of the ``t``-th tile of a matrix with ``n_cols`` columns."""
    across = tl.cdiv(n_cols, COLS)
    return (
        (t // across) * ROWS + tl.arange(0, ROWS),
        (t % across) * COLS + tl.arange(0, COLS),
    )


@triton.jit
def _largest(
    starts, rows, most, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a = size(row, N_G), size(row, N_A)
    i, j = tile_at(row, t, n_a, ROWS, COLS)
    x = tl.abs(tile(at(row, P, T), tl.load(row + LD_P), i, j, n_g, n_a))
    x = tl.where(finite(x), x, float("inf"))  # a maximum may drop a NaN
    tl.store(most + tl.load(row + MOST) + t, tl.max(tl.max(x, 1), 0))


@triton.jit
def _scaled(
    starts, rows, most, tiny: tl.float64, WORDS: tl.constexpr, ENTRIES: tl.constexpr,
    T: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a = size(row, N_G), size(row, N_A)
    part = tl.arange(0, PARTS)
    parts = tl.cdiv(n_g, ROWS) * tl.cdiv(n_a, COLS)
    largest = tl.full((), 0.0, T)
    for p0 in tl.range(0, parts, PARTS):
        seen = tl.load(most + tl.load(row + MOST) + p0 + part, mask=p0 + part < parts, other=0.0)
        largest = tl.maximum(largest, tl.max(seen, 0))
    largest = tl.where(finite(largest), tl.maximum(largest, number(tiny, T)), float("nan"))
    i, j = tile_at(row, t, n_a, ROWS, COLS)
    x = divide(tile(at(row, P, T), tl.load(row + LD_P), i, j, n_g, n_a), largest.to(T))
    x = tl.where(finite(largest), x, float("nan"))
    # As P lies and transposed; which of them is X depends on the shorter side.
    wide, k, n = n_g <= n_a, rounded(row, K_UP), rounded(row, N_UP)
    X = place_of(row, X_PLACE, T, ALIGNED)
    columns = X + k.to(tl.int64) * n
    rows_up, cols_up = tl.where(wide, k, n), tl.where(wide, n, k)
    i, j = i.to(tl.int64)[:, None], j.to(tl.int64)[None, :]
    inside = (i < rows_up) & (j < cols_up)
    tl.store(tl.where(wide, X, columns) + i * cols_up + j, x, mask=inside)
    tl.store(tl.where(wide, columns, X) + j * rows_up + i, x, mask=inside)


@triton.jit
def norm_of(row, sums, ridge, tiny, T: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr):
    """norm of (17), and what is added to the diagonal: from the partial sums of (16)."""
    k = size(row, K)
    across = tl.cdiv(k, TILE)
    parts = (across * (across + 1)) // 2
    part = tl.arange(0, PARTS)
    squares, trace = tl.zeros((PARTS,), tl.float64), tl.zeros((PARTS,), tl.float64)
    first = sums + 2 * tl.load(row + SUMS)
    for p0 in tl.range(0, parts, PARTS):
        squares += tl.load(first + 2 * (p0 + part), mask=p0 + part < parts, other=0.0)
        trace += tl.load(first + 2 * (p0 + part) + 1, mask=p0 + part < parts, other=0.0)
    shift = ridge * tl.sum(trace, 0) / k
    norm = tl.sqrt(tl.sum(squares, 0)) + shift
    return tl.where(norm < tiny, tiny, norm), shift  # a NaN stays


@triton.jit
def _gram(
    starts, rows, sums, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    k, n = rounded(row, K_UP), rounded(row, N_UP)
    block_i, block_j = triangle(t)
    i, j = block_i * TILE + tl.arange(0, TILE), block_j * TILE + tl.arange(0, TILE)
    X = place_of(row, X_PLACE, T, ALIGNED)
    total = tl.zeros((TILE, TILE), T)
    for m0 in tl.range(0, n, DEPTH):
        m = m0 + tl.arange(0, DEPTH)
        x_i, x_j = tile(X, n, i, m, k, n), tile(X, n, j, m, k, n)
        total = tl.dot(x_i, tl.trans(x_j), total, input_precision=PRECISION, out_dtype=T)  # (16)
    store_both(place_of(row, 0, T, ALIGNED), k, i, j, k, total, True)
    twice = tl.where(block_i == block_j, 1.0, 2.0)
    wide = total.to(tl.float64)
    on_diagonal = (i[:, None] == j[None, :]) & (block_i == block_j)
    first = sums + 2 * (tl.load(row + SUMS) + t)
    # Flat: of a TF32 product Triton 3.6 compiles no sums by rows for sm_100.
    tl.store(first, twice * tl.sum(tl.ravel(wide * wide), 0))
    tl.store(first + 1, tl.sum(tl.ravel(tl.where(on_diagonal, wide, 0.0)), 0))


@triton.jit
def _normalise(
    starts, rows, sums, ridge: tl.float64, tiny: tl.float64, WORDS: tl.constexpr,
    ENTRIES: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    k = rounded(row, K_UP)
    norm, shift = norm_of(row, sums, ridge, tiny, T, PARTS, TILE)
    i, j = tile_at(row, t, k, ROWS, COLS)
    G = place_of(row, 0, T, ALIGNED)
    g = divide(tile(G, k, i, j, k, k), norm.to(T))
    g += tl.where(i[:, None] == j[None, :], (shift / norm).to(T), 0.0)  # (17)
    inside = (i < k)[:, None] & (j < k)[None, :]
    tl.store(G + i.to(tl.int64)[:, None] * k + j[None, :], g, mask=inside)


@triton.jit
def _product(
    starts, rows, sums, ridge: tl.float64, tiny: tl.float64, a: tl.float64, b: tl.float64,
    c: tl.float64, LEFT: tl.constexpr, RIGHT: tl.constexpr, SECOND: tl.constexpr,
    OUT: tl.constexpr, OUT2: tl.constexpr, QUINTIC: tl.constexpr, LAST: tl.constexpr,
    WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """OUT = LEFT RIGHT, all symmetric; a second half of the programs makes OUT2 = LEFT SECOND.

    With QUINTIC it is R = a*I + b*LEFT + c*LEFT RIGHT, and LAST divides that by the root of
    the norm."""
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    k = rounded(row, K_UP)
    across = tl.cdiv(k, TILE)
    half = (across * (across + 1)) // 2
    second = t >= half
    block_i, block_j = triangle(tl.where(second, t - half, t))
    i, j = block_i * TILE + tl.arange(0, TILE), block_j * TILE + tl.arange(0, TILE)
    left, right = place_of(row, LEFT, T, ALIGNED), place_of(row, RIGHT, T, ALIGNED)
    if SECOND >= 0:
        right = tl.where(second, place_of(row, SECOND, T, ALIGNED), right)
    total = tl.zeros((TILE, TILE), T)
    for m0 in tl.range(0, k, DEPTH):
        m = m0 + tl.arange(0, DEPTH)
        total = tl.dot(
            tile(left, k, i, m, k, k), tl.trans(tile(right, k, j, m, k, k)), total,
            input_precision=PRECISION, out_dtype=T,
        )  # (18), both along their rows: they are symmetric  # fmt: skip
    if QUINTIC:
        total = number(b, T) * tile(left, k, i, j, k, k) + number(c, T) * total
        total += tl.where(i[:, None] == j[None, :], number(a, T), 0.0)  # (18)
        if LAST:
            norm, _ = norm_of(row, sums, ridge, tiny, T, PARTS, TILE)
            total *= (1.0 / tl.sqrt(norm)).to(T)
    out = place_of(row, OUT, T, ALIGNED)
    if OUT2 >= 0:
        out = tl.where(second, place_of(row, OUT2, T, ALIGNED), out)
    store_both(out, k, i, j, k, total, True)


@triton.jit
def _finish(
    starts, rows, Z: tl.constexpr, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    ALIGNED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a = size(row, N_G), size(row, N_A)
    k, n = rounded(row, K_UP), rounded(row, N_UP)
    i, j = tile_at(row, t, n, TILE, TILE)
    z = place_of(row, Z, T, ALIGNED)
    columns = place_of(row, X_PLACE, T, ALIGNED) + k.to(tl.int64) * n  # X'
    total = tl.zeros((TILE, TILE), T)
    for m0 in tl.range(0, k, DEPTH):
        m = m0 + tl.arange(0, DEPTH)
        left, right = tile(z, k, i, m, k, k), tl.trans(tile(columns, k, j, m, n, k))
        total = tl.dot(
            left.to(OPERAND), right.to(OPERAND), total, input_precision=PRECISION, out_dtype=T
        )  # (19)
    inside = (i < tl.minimum(n_g, n_a))[:, None] & (j < tl.maximum(n_g, n_a))[None, :]
    out, stride = at(row, P, T), tl.load(row + LD_P)
    i, j = i[:, None], j[None, :]
    if n_g <= n_a:
        tl.store(out + i * stride + j, total, mask=inside)
    else:
        tl.store(out + j * stride + i, total, mask=inside)


def polar_(P, work, coefficients, ridge, shifts) -> None:
    """(16) to (19) for all layers: 3t + 4 launches for t iterations; layers that share their work
    go one after the other.

    Products are TF32 where torch's own may be, else three TF32 products for one: a number is the
    sum of two of TF32 but for 2^-22 of it, so that three are as exact as one of fp32.
    """
    if shifts is not None:
        raise Unsupported("the triton kernels make no inverses")
    if len({w.data_ptr() for w in work}) < len(work):
        for i in range(len(P)):
            polar_(P[i : i + 1], work[i : i + 1], coefficients, ridge, shifts)
        return
    if P:
        args = (P, work, tuple(coefficients), ridge)
        _polar(choose("polar_", PRODUCTS, _polar, args), *args)


def _polar(product: Product, P, work, coefficients, ridge) -> None:
    T, device, e, side = real_type(*P, *work), P[0].device, ELEMENTWISE, product.tile
    rows, tiles, squares, halves, both, whole, most, sums = [], [], [], [], [], [], 0, 0
    for p, w in zip(P, work, strict=True):
        n_g, n_a = p.shape
        k, n = min(n_g, n_a), max(n_g, n_a)
        ups = map(rounded_up, (k, n))
        rows.append([n_g, n_a, k, *matrix(p), pointer(w), most, sums, *ups])
        tiles.append(blocks(n_g, e.rows) * blocks(n_a, e.cols))
        squares.append(blocks(rounded_up(k), e.rows) * blocks(rounded_up(k), e.cols))
        across = blocks(k, side)
        halves.append(across * (across + 1) // 2)
        both.append(2 * halves[-1])
        whole.append(across * blocks(n, side))
        most, sums = most + tiles[-1], sums + halves[-1]
    table = TABLES.get(device, rows, tiles, squares, halves, both, whole)
    by_tile, by_square, by_half, by_both, by_whole = range(5)
    largest = torch.empty(most, dtype=P[0].dtype, device=device)
    partial = torch.empty(2 * sums, dtype=torch.float64, device=device)
    tiny, exact = torch.finfo(P[0].dtype).tiny, precision(T, device)
    if T is tl.float32 and exact == "ieee":
        exact = "tf32x3"
    aligned = dict(ALIGNED=all(w.data_ptr() % 16 == 0 for w in work))
    common: dict[str, Any] = dict(WORDS=WORDS, ENTRIES=table.entries, T=T, device=device)
    elements = dict(ROWS=e.rows, COLS=e.cols, num_warps=warps(e.warps, T), **common)
    products = dict(
        TILE=side, DEPTH=product.depth * 4 // P[0].element_size(),
        num_warps=warps(product.warps, T), num_stages=product.stages, PRECISION=exact, **common,
        **aligned,
    )  # fmt: skip
    parts = 64

    def go(kernel, on: int, *args, **options) -> None:
        launch(kernel, table.programs[on], table.starts[on], table.rows, *args, **options)

    go(_largest, by_tile, largest, **elements)
    go(_scaled, by_tile, largest, tiny, PARTS=parts, **elements, **aligned)
    go(_gram, by_half, partial, **products)
    go(_normalise, by_square, partial, ridge, tiny, PARTS=parts, TILE=side, **elements, **aligned)
    G, R, Y, Z, spare = range(5)
    iterations = [coefficients[t : t + 3] for t in range(0, len(coefficients), 3)]
    for t, numbers in enumerate(iterations):
        first, last = t == 0, t == len(iterations) - 1

        def multiply(on, left, right, out, also=-1, out2=-1, quintic=False, end=last, by=numbers):
            go(
                _product, on, partial, ridge, tiny, *by, LEFT=left, RIGHT=right, SECOND=also,
                OUT=out, OUT2=out2, QUINTIC=quintic, LAST=quintic and end, PARTS=parts, **products,
            )  # fmt: skip

        multiply(by_half, G, G, R, quintic=True)
        if not last:
            if first:  # Z is R alone
                multiply(by_half, R, G, Y)
            else:
                multiply(by_both, R, G, Y, also=Z, out2=spare)
            multiply(by_half, R, Y, G)
        elif not first:
            multiply(by_half, R, Z, spare)
        if first:
            R, Z = Z, R
        else:
            Z, spare = spare, Z
    go(_finish, by_whole, Z=Z, OPERAND=operand_type(T, T, device), **products)
