"""kron_precondition in Triton: equation (3), the products of all layers grouped.

launch       programs              bytes per layer, e per element               FLOPs
`_left`      per tile of work      H_g, M read, n_g n_a e written               2 n_g^2 n_a
`_right`     per tile of P         work, H_a read, n_g n_a e written            2 n_g n_a^2

With one factor there is its launch alone, from M to P.

`kron_step_` is `momentum_`, these and `descend_`: to form the new M while loading it, in every
tile anew, took twice as long on an H100 as to store it first. Operands are read once per tile of
the other side, n/64 times, through the L2 (all of them together are some 25 MB in the MNIST
autoencoder, an H100's L2 has 50). The ops without a product are in parameters_triton.py.
"""

from __future__ import annotations

import dataclasses

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
    place,
    table_of,
    tile_of,
)
from kbfgs_ext.ops.kron_precondition.parameters_triton import descend_ as descend_
from kbfgs_ext.ops.kron_precondition.parameters_triton import momentum_ as momentum_
from kbfgs_ext.ops.kron_precondition.parameters_triton import output_change_ as output_change_
from kbfgs_ext.ops.kron_precondition.parameters_triton import restore_ as restore_
from kbfgs_ext.ops.kron_precondition.parameters_triton import slope_ as slope_
from kbfgs_ext.ops.triton_common import (
    at,
    by_rows,
    launch,
    locate,
    matrix,
    operand_type,
    pointer,
    precision,
    real_type,
    size,
    warps,
)


@dataclasses.dataclass(frozen=True)
class Product:
    """Square tiles along ``depth`` at a time; 64 x 64 are 744 of the MNIST autoencoder.

    The first of each precision is the fastest of some on an H100 (README.md in this folder) that
    spills nothing; in fp32 that had three stages, with which it does.
    """

    tile: int
    depth: int
    warps: int
    stages: int = 3


# The first is taken unless KBFGS_AUTOTUNE=1 (autotune.py) finds another faster.
PRODUCTS = {
    "ieee": (Product(64, 16, 4, stages=2), Product(64, 16, 8), Product(32, 32, 4)),
    "tf32": (Product(64, 32, 4), Product(128, 32, 8), Product(32, 32, 4)),
}


LEFT_OUT = {True: WORK.value, False: P.value}  # where H_g M goes, with and without H_a


@triton.jit
def _left(
    starts, rows, OUT: tl.constexpr, WORDS: tl.constexpr, ENTRIES: tl.constexpr, T: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a = size(row, N_G), size(row, N_A)
    i, j = place(row, t, TILE, TILE)
    total = tl.zeros((TILE, TILE), T)
    for k0 in tl.range(0, n_g, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        h = tile_of(row, H_G, i, k, n_g, n_g, T)
        m = tile_of(row, MOMENTUM, k, j, n_g, n_a, T)
        total = tl.dot(h.to(OPERAND), m.to(OPERAND), total, input_precision=PRECISION, out_dtype=T)
    out = at(row, OUT, T) + i[:, None] * tl.load(row + OUT + 1) + j[None, :]
    tl.store(out, total, mask=(i < n_g)[:, None] & (j < n_a)[None, :])


@triton.jit
def _right(
    starts, rows, LEFT: tl.constexpr, WORDS: tl.constexpr, ENTRIES: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    entry, t = locate(starts, ENTRIES)
    row = rows + entry * WORDS
    n_g, n_a = size(row, N_G), size(row, N_A)
    i, j = place(row, t, TILE, TILE)
    total = tl.zeros((TILE, TILE), T)
    for k0 in tl.range(0, n_a, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        left = tile_of(row, LEFT, i, k, n_g, n_a, T)
        # H_a is symmetric. Tensor cores take it along its rows as well; else rows are its k.
        if PRECISION == "ieee":
            h = tile_of(row, H_A, k, j, n_a, n_a, T)
        else:
            h = tl.trans(tile_of(row, H_A, j, k, n_a, n_a, T))
        total = tl.dot(
            left.to(OPERAND), h.to(OPERAND), total, input_precision=PRECISION, out_dtype=T
        )  # (3)
    inside = (i < n_g)[:, None] & (j < n_a)[None, :]
    tl.store(at(row, P, T) + i[:, None] * tl.load(row + P + 1) + j[None, :], total, mask=inside)


def _by_products(kernel, product, table, device, **constants) -> None:
    T = constants["T"]
    launch(
        kernel, table.programs[0], table.starts[0], table.rows, WORDS=WORDS, ENTRIES=table.entries,
        PRECISION=precision(T, device), OPERAND=operand_type(T, T, device),
        TILE=product.tile, DEPTH=product.depth, num_warps=warps(product.warps, T),
        num_stages=product.stages, device=device, **constants,
    )  # fmt: skip


def _shared(work) -> bool:
    """Whether layers share their scratch, as they may on the CPU: then they go one by one."""
    return len({w.data_ptr() for w in work}) < len(work)


def kron_precondition_(P, H_g, M, H_a, work) -> None:
    """(3) for all layers: a launch for either factor.

    fp32 products are fp32 throughout, unless `torch.set_float32_matmul_precision` allows TF32
    ("high") or bf16 operands ("medium"); sums are fp32.
    """
    if H_g and H_a and _shared(work):
        for i in range(len(P)):
            part = slice(i, i + 1)
            kron_precondition_(P[part], H_g[part], M[part], H_a[part], work[part])
        return
    if not P:
        return
    args = (P, by_rows(H_g), by_rows(M), by_rows(H_a), work)
    products = PRODUCTS[precision(real_type(*P), P[0].device)]
    _precondition(choose("kron_precondition_", products, _precondition, args), *args)


def _precondition(product: Product, P, H_g, M, H_a, work) -> None:
    T = real_type(*P)
    both = bool(H_g and H_a)
    table = table_of(P, product.tile, product.tile, H_g, H_a, M, P, work if both else ())
    if H_g:
        _by_products(_left, product, table, P[0].device, T=T, OUT=LEFT_OUT[both])
    left = (WORK if both else MOMENTUM).value
    if H_a:
        _by_products(_right, product, table, P[0].device, T=T, LEFT=left)


def kron_step_(
    W, b, M, P, work, dW, db, H_g, H_a, step_size, momentum, weight_decay, ok
) -> None:  # fmt: skip
    """(2), (3), (4) for all layers: four launches. Precision as in `kron_precondition_`."""
    if not P:
        return
    real_type(*M, *P, *work)  # what would be declined is, before anything is written
    for t in (*M, *P, *work, *W):
        matrix(t)
    for t in (*b, *step_size):
        pointer(t)
    momentum_(M, dW, db, W, b, momentum, weight_decay, ok)
    kron_precondition_(P, H_g, M, H_a, work)
    descend_(W, b, P, step_size, ok)
