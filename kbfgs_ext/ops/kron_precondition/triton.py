"""kron_precondition in Triton: equations (2) to (4), the products of all layers grouped.

launch       programs              bytes per layer, e per element               FLOPs
`_left`      per tile of work      H_g, M (with (2) also dW and W) read,        2 n_g^2 n_a
                                   n_g n_a e written
`_right`     per tile of P         work and H_a read, n_g n_a e written;        2 n_g n_a^2
                                   with (2), (4) also dW, W, M read, W, M written

`kron_step_` is two launches. `_left` forms the new M while loading it, and stores nothing: other
programs still need the old M and W. `_right` forms it once more for its own tile, which no other
program touches, stores it, takes the step and leaves the old weights in P. Operands are read once
per tile of the other side, n/64 times, through the L2 (all of them together are some 25 MB in the
MNIST autoencoder, an H100's L2 has 50). The ops without a product are in parameters_triton.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl

from kbfgs_ext.ops.autotune import choose
from kbfgs_ext.ops.kron_precondition.lengths_triton import lengths_ as lengths_
from kbfgs_ext.ops.kron_precondition.parameters_triton import (
    H_A,
    H_G,
    MOMENTUM,
    N_A,
    N_G,
    WORDS,
    WORK,
    P,
    new_M,
    place,
    step,
    table_of,
    tile_of,
)
from kbfgs_ext.ops.kron_precondition.parameters_triton import descend_ as descend_
from kbfgs_ext.ops.kron_precondition.parameters_triton import momentum_ as momentum_
from kbfgs_ext.ops.kron_precondition.parameters_triton import output_change_ as output_change_
from kbfgs_ext.ops.kron_precondition.parameters_triton import restore_ as restore_
from kbfgs_ext.ops.kron_precondition.parameters_triton import slope_ as slope_
from kbfgs_ext.ops.triton_common import (
    alike,
    at,
    by_rows,
    flag,
    input_type,
    launch,
    locate,
    operand_type,
    precision,
    real_type,
    size,
)


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


# The first is taken unless KBFGS_AUTOTUNE=1 (autotune.py) finds another faster.
PRODUCTS = (Product(), Product(tile=128, stages=3), Product(tile=32, depth=32, warps=4))


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


def _by_products(kernel, product, table, device, **constants) -> None:
    T = constants["T"]
    launch(
        kernel, table.programs[0], table.starts[0], table.rows, WORDS=WORDS, ENTRIES=table.entries,
        PRECISION=precision(T, device), OPERAND=operand_type(T, T, device),
        TILE=product.tile, DEPTH=product.depth, num_warps=product.warps,
        num_stages=product.stages, device=device, **constants,
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
    table = table_of(P, product.tile, product.tile, H_g, H_a, M, P, work if H_g else ())
    plain = dict(ok=None, mu=0.0, decay=0.0, FUSED=False, T=T, WT=T, GT=T)
    if H_g:
        _by_products(_left, product, table, P[0].device, **plain)
    _by_products(
        _right, product, table, P[0].device, LEFT=(WORK if H_g else MOMENTUM).value, **plain
    )


@alike("W", "b", "dW", "db")
def kron_step_(
    W, b, M, P, work, dW, db, H_g, H_a, step_size, momentum, weight_decay, ok
) -> None:  # fmt: skip
    """(2), (3), (4) for all layers: two launches. Precision as in `kron_precondition_`."""
    if _shared(work):
        lists = (W, b, M, P, work, dW, db, H_g, H_a, step_size)
        for i in range(len(W)):
            one = [given[i : i + 1] for given in lists]
            kron_step_(*one, momentum, weight_decay, ok)
        return
    if not P:
        return
    dW, db, H_g, H_a = by_rows(dW), by_rows(db), by_rows(H_g), by_rows(H_a)
    args = (W, b, M, P, work, dW, db, H_g, H_a, step_size, momentum, weight_decay, ok)
    _step(choose("kron_step_", PRODUCTS, _step, args), *args)


def _step(
    product: Product, W, b, M, P, work, dW, db, H_g, H_a, step_size, momentum, weight_decay, ok
) -> None:  # fmt: skip
    table = table_of(P, product.tile, product.tile, H_g, H_a, M, P, work, W, b, dW, db, step_size)
    types: dict[str, Any] = dict(
        T=real_type(*M, *P), WT=input_type([*W, *b]), GT=input_type([*dW, *db])
    )
    fused = dict(ok=ok, mu=momentum, decay=weight_decay, FUSED=True, **types)
    _by_products(_left, product, table, P[0].device, **fused)
    _by_products(_right, product, table, P[0].device, LEFT=WORK.value, **fused)
