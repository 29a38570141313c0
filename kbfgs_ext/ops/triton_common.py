"""What the Triton kernels of all families share: the layer table, launches, device functions.

A launch covers all layers. It reads pointers and sizes from a *layer table*: one row of int64
words per layer or factor, written to the device once and kept for as long as the pointers are in
use, so that a step uploads nothing. Programs find their row by their number: ``starts`` holds the
first program of each row.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kbfgs_ext import environment
from kbfgs_ext.ops.registry import Unsupported
from kbfgs_ext.ops.triton_launch import COMPILER as COMPILER
from kbfgs_ext.ops.triton_launch import alike as alike
from kbfgs_ext.ops.triton_launch import keep
from kbfgs_ext.ops.triton_launch import launch as launch

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
NEVER = 1 << 62  # first program of the rows that only fill up the table
MANY = tl.constexpr(1024)  # rows that a program looks at all at once; it searches more of them
TABLES_IN_A_BLOCK = 64  # a step needs about ten, and a capture may not make a block
CACHED_TABLES = 256  # a step needs about ten; gradients that move make a few more


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Products of a matrix with a vector: a program has ``rows`` rows and walks along them.

    16 x 128 fp32 are 8 KB in flight per program of 4 warps; four programs per SM cover latency
    times bandwidth of an H100 (about 16 KB per SM). More rows leave SMs idle: the MNIST
    autoencoder has 547 blocks of 16 rows for 132 SMs.
    """

    rows: int = 16
    cols: int = 128
    length: int = 1024  # elements of a vector at a time where one program has a whole vector
    warps: int = 4


VECTORS = Vectors()


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows on the device, and per launch the first program of each row."""

    rows: torch.Tensor  # (rows, words) int64, flat
    starts: tuple[torch.Tensor, ...]  # (entries,) int64 each
    programs: tuple[int, ...]
    entries: int  # rows rounded up to a power of two, at least 2


class Tables:
    """The tables in use, by content: a table that was uploaded once is found again."""

    def __init__(self) -> None:
        self._tables: collections.OrderedDict[tuple, Table] = collections.OrderedDict()
        self._staging: dict[torch.device, tuple[torch.Tensor, int]] = {}
        self._captured: dict[int, Table | torch.Tensor] = {}

    def get(
        self, device: torch.device, rows: Sequence[Sequence[int]], *programs: Sequence[int]
    ) -> Table:
        """The table of ``rows``; ``programs`` holds, per launch, each row's number of programs."""
        key = (device, tuple(map(tuple, rows)), tuple(map(tuple, programs)))
        table = self._tables.get(key)
        if table is not None:
            self._tables.move_to_end(key)
            self._keep(table, device)
            return table
        entries = max(2, triton.next_power_of_2(len(rows)))
        words: list[int] = []
        for counts in programs:
            first = [0, *itertools.accumulate(counts)][: len(rows)]
            words += first + [NEVER] * (entries - len(rows))
        for row in rows:
            words += row
        flat = self._upload(words, device)
        starts = tuple(flat[i * entries : (i + 1) * entries] for i in range(len(programs)))
        table = Table(flat[len(programs) * entries :], starts, tuple(map(sum, programs)), entries)
        # In a capture the copy happens at replay only: not a table that a later call may find.
        if not _capturing(device):
            self._tables[key] = table
            if len(self._tables) > CACHED_TABLES:
                self._tables.popitem(last=False)
        return table

    def _upload(self, words: list[int], device: torch.device) -> torch.Tensor:
        host = torch.tensor(words, dtype=torch.int64, device="cpu")
        if device.type != "cuda":
            return host
        staging = self._pinned(host.numel(), device)
        staging.copy_(host)
        return staging.to(device, non_blocking=True)

    def _pinned(self, size: int, device: torch.device) -> torch.Tensor:
        """Page-locked words, never written twice: a copy, or a graph's, may still read them.

        They come in blocks of at least 64 Ki words (512 KB, some 300 tables), because memory cannot
        be page-locked during a capture: the warm-up steps before it make the block.
        """
        block, used = self._staging.get(device, (torch.empty(0, device="cpu"), 0))
        if used + size > block.numel():
            room = max(1 << 16, TABLES_IN_A_BLOCK * size)
            block = torch.empty(room, dtype=torch.int64, device="cpu", pin_memory=True)
            used = 0
        self._staging[device] = block, used + size
        self._keep(block, device)
        return block[used : used + size]

    def _keep(self, used: Table | torch.Tensor, device: torch.device) -> None:
        """What a capture uses is read at every replay: kept for good, whatever the cache drops."""
        if _capturing(device):
            self._captured[id(used)] = used


TABLES = Tables()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def real_type(*tensors: torch.Tensor) -> tl.dtype:
    """The state's one dtype, fp32 or fp64; anything else is declined."""
    types = {t.dtype for t in tensors}
    if len(types) != 1 or not types <= {torch.float32, torch.float64}:
        raise Unsupported(f"Triton kernels take float32 or float64 state, got {_names(types)}")
    return TYPES[types.pop()]


def input_type(tensors: Sequence[torch.Tensor]) -> tl.dtype:
    """The one dtype of inputs, 16 to 64 bits, but for empty ones; anything else is declined."""
    types = {t.dtype for t in tensors if t.numel()} or {t.dtype for t in tensors}
    if len(types) != 1 or not types <= TYPES.keys():
        raise Unsupported(f"Triton kernels take inputs of one dtype in a call, got {_names(types)}")
    return TYPES[types.pop()]


def operand_type(given: tl.dtype, T: tl.dtype, device: torch.device) -> tl.dtype:
    """What a product's operands are rounded to; sums are in T whatever they are.

    16-bit inputs stay (their products are exact in fp32). fp32 becomes bf16 where torch's setting
    is "medium".
    """
    if T is not tl.float32:
        return T
    if given.primitive_bitwidth == 16:
        return given
    return tl.bfloat16 if environment.float32_matmul_precision(device) == "medium" else T


def warps(fp32: int, T: tl.dtype) -> int:
    """Twice the warps for fp64 tiles: the registers of a thread then hold as many bytes."""
    return fp32 * (2 if T is tl.float64 else 1)


def precision(T: tl.dtype, device: torch.device) -> str:
    """Of products: "ieee", or "tf32" for fp32 where torch's own products may use it too."""
    exact = T is not tl.float32 or environment.float32_matmul_precision(device) == "highest"
    return "ieee" if exact else "tf32"


def _names(types: set[torch.dtype]) -> str:
    return ", ".join(sorted(map(str, types)))


def pointer(t: torch.Tensor) -> int:
    """Address of a scalar or of a vector without gaps."""
    if t.dim() and not _in_rows(t):
        raise Unsupported(f"Triton kernels take vectors without gaps, got stride {t.stride(0)}")
    return t.data_ptr()


def matrix(t: torch.Tensor) -> tuple[int, int]:
    """Address and row stride of a matrix whose rows are contiguous."""
    if not _in_rows(t):
        raise Unsupported(f"Triton kernels take matrices by rows, got strides {t.stride()}")
    return t.data_ptr(), t.stride(0)


def by_rows(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs as `pointer` and `matrix` want them: copies of those that are not.

    The copies are the caller's to keep until it has launched.
    """
    return keep([t if t.dim() == 0 or _in_rows(t) else t.contiguous() for t in tensors])


def _in_rows(t: torch.Tensor) -> bool:
    return t.shape[-1] <= 1 or t.stride(-1) == 1


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


# Device functions. A row's words are numbered by tl.constexpr names; T is the state's dtype.

# The first words of a row in double_damping and bfgs_update: a factor H and a pair for it.
N, H, LD_H, S, Y, HY, C, COUNTS, LAM = (tl.constexpr(i) for i in range(9))


@triton.jit
def locate(starts, ENTRIES: tl.constexpr):
    """This program's row of the table and its number among the row's programs."""
    pid = tl.program_id(0)
    if ENTRIES <= MANY:
        first = tl.load(starts + tl.arange(0, ENTRIES))
        begun = first <= pid
        entry = tl.sum(begun.to(tl.int32), 0) - 1
        begin = tl.max(tl.where(begun, first, 0), 0)
    else:
        entry, half = tl.full((), 0, tl.int32), tl.full((), ENTRIES // 2, tl.int32)
        while half > 0:
            middle = entry + half
            entry = tl.where(tl.load(starts + middle) <= pid, middle, entry)
            half = half // 2
        begin = tl.load(starts + entry)
    return entry, pid - begin.to(tl.int32)


@triton.jit
def size(row, WORD: tl.constexpr):
    """A size from the table; strides stay int64, so that offsets are."""
    return tl.load(row + WORD).to(tl.int32)


@triton.jit
def at(row, WORD: tl.constexpr, T: tl.constexpr):
    """A pointer from the table."""
    return tl.load(row + WORD).to(tl.pointer_type(T))


@triton.jit
def number(value, T: tl.constexpr):
    """A float64 argument in the state's dtype."""
    return tl.full((), value, T)


@triton.jit
def flag(ok):
    """An optional bool scalar on the device; absent is true."""
    if ok is None:
        return tl.full((), 1, tl.int1)
    else:
        return tl.load(ok) != 0


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")  # false for NaN


@triton.jit
def divide(x, y):
    """x / y, rounded as IEEE asks (Triton's fp32 ``/`` is not)."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def root(x):
    """sqrt(x), rounded as IEEE asks."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def vector(base, j, n):
    """base[j], zero from n on."""
    return tl.load(base + j, mask=j < n, other=0.0)


@triton.jit
def tile(base, stride, i, j, n_rows, n_cols):
    """base[i, j], zero outside."""
    inside = (i < n_rows)[:, None] & (j < n_cols)[None, :]
    return tl.load(base + i[:, None] * stride + j[None, :], mask=inside, other=0.0)


@triton.jit
def store_both(base, stride, i, j, n, new, keep):
    """base[i, j] = base[j, i] = new[i, j] for j <= i < n, where ``keep``.

    A diagonal tile's upper half is not stored as computed: of a*b + c*d the compiler fuses one
    product into the sum and rounds the other, so new[i, j] and new[j, i] need not be the same.
    """
    below = (i < n)[:, None] & (j[None, :] <= i[:, None]) & keep
    tl.store(base + i[:, None] * stride + j[None, :], new, mask=below)
    above = (i < n)[None, :] & (j[:, None] < i[None, :]) & keep
    tl.store(base + j[:, None] * stride + i[None, :], tl.trans(new), mask=above)


@triton.jit
def triangle(t):
    """Row and column of the ``t``-th tile of a lower triangle, counted row by row."""
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += (((i + 1) * (i + 2)) // 2 <= t).to(tl.int32)  # the root's rounding is put right
    i -= ((i * (i + 1)) // 2 > t).to(tl.int32)
    return i, t - (i * (i + 1)) // 2


@triton.jit
def product(H, stride, v, i, n, T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows ``i`` of H v, H n x n: n*ROWS elements read, 2*n*ROWS FLOPs.

    Sums go into a tile first and over its columns last: short chains, small rounding errors.
    """
    total = tl.zeros((ROWS, COLS), T)
    for j0 in tl.range(0, n, COLS):
        j = j0 + tl.arange(0, COLS)
        total += tile(H, stride, i, j, n, n) * vector(v, j, n)[None, :]
    return tl.sum(total, 1)


if environment.triton_interpreted():
    # NumPy 2.4 turns no one-element array into an int; Triton 3.6's interpreter asks it to.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope) -> None:
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index

    # A comparison is a bool. The interpreter gives it its operands' dtype, and newer ones than 3.6
    # make integers of it where it is spread over a tile: no mask.
    _binary_op = interpreter.InterpreterBuilder.binary_op

    def _with_bools(self, lhs, rhs, op):
        result = _binary_op(self, lhs, rhs, op)
        if result.data.dtype == bool:
            result.dtype = tl.int1
        return result

    interpreter.InterpreterBuilder.binary_op = _with_bools
