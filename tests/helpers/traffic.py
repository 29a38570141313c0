"""Bytes that a GPU step moves, reckoned from the kernels: what the tables of the op READMEs hold.

Matrices only; vectors are a percent of them. An operand counts once per launch that reads it, since
what a launch reads again comes from the L2. `tests/triton/interpreted/test_traffic.py` holds the
Triton figures to what the kernels really access, `tests/cuda_host/test_launches.py` the CUDA ones
to what their launcher asks for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from benchmarks import launches as counted

AUTOENCODERS = {  # layer sizes of the paper's models
    "mnist": (784, 1000, 500, 250, 30, 250, 500, 1000, 784),
    "faces": (625, 2000, 1000, 500, 30, 500, 1000, 2000, 625),
}
BATCH = 1000
FP32 = 4


@dataclasses.dataclass(frozen=True)
class Device:
    """An H100: what the curvature update's launcher asks of the device."""

    multiprocessors: int = 132
    shared_bytes: int = 232_448


@dataclasses.dataclass(frozen=True)
class Layer:
    d_in: int
    n_g: int
    m: int = BATCH
    x_bytes: int = FP32  # of an element of X: 2 under autocast

    @property
    def X(self) -> float:
        """X in elements of 32 bits."""
        return self.m * self.d_in * self.x_bytes / FP32

    @property
    def n_a(self) -> int:
        return self.d_in + 1

    @property
    def weights(self) -> int:
        return self.n_g * self.n_a


def layers(sizes: Sequence[int], batch: int = BATCH, x_bytes: int = FP32) -> list[Layer]:
    return [Layer(d_in, n_g, batch, x_bytes) for d_in, n_g in itertools.pairwise(sizes)]


def _sum(elements: Callable[[Layer], float]) -> Callable[[list[Layer]], float]:
    return lambda model: FP32 * sum(elements(layer) for layer in model)


FLOOR = {
    "factor_ema_": _sum(lambda x: x.X + 1.5 * x.n_a**2),
    "curvature_update_, ema": _sum(lambda x: 3 * x.n_a**2 + 2 * x.n_g**2),
    "curvature_update_, minibatch": _sum(lambda x: 2 * x.n_a**2 + x.X + 2 * x.n_g**2),
    "kron_step_": _sum(lambda x: x.n_g**2 + x.n_a**2 + 6 * x.weights),
}

READING_X = ("factor_ema_", "curvature_update_, minibatch")

# The columns' launch reads X, the tiles' launch again. Gradient sides as where at most one damping
# is at work; with both, n_g^2 more.
TRITON = {
    "factor_ema_": _sum(lambda x: 2 * x.X + 1.5 * x.n_a**2),
    "curvature_update_, ema": _sum(lambda x: 4.5 * x.n_a**2 + 2.5 * x.n_g**2),
    "curvature_update_, minibatch": _sum(
        lambda x: 3.5 * x.n_a**2 + 2.5 * x.n_g**2 + (1 + 2 / 32) * x.X
    ),
    "kron_step_": _sum(lambda x: x.n_g**2 + x.n_a**2 + 12 * x.weights),
}


def blocks_of(model: list[Layer], device: Device, from_X: bool = False) -> int:
    """Blocks of the one launch of `curvature_update_`: as launch_part in curvature_cuda.cu."""
    total = sum(x.n_a**2 + x.n_g**2 + (x.m * x.n_a if from_X else 0) for x in model)
    return min(device.multiprocessors, -(-total * FP32 // 65536))


def chip_bytes(model: list[Layer], device: Device) -> int:
    """Shared memory that each of them asks for."""
    total = sum(x.n_a**2 + x.n_g**2 for x in model)
    widest = max(max(x.n_a, x.n_g) for x in model)
    wanted = (-(-total // blocks_of(model, device)) + widest) * FP32 * 9 // 8 + 1024
    return min(device.shared_bytes, ROOM + wanted) // 16 * 16


ROOM = 512 * 8  # CurvatureShape::kRoomBytes


def rows_read_again(model: list[Layer], device: Device) -> tuple[int, int]:
    """Elements of H_a and of H_g that no block can keep on chip, as class Parts shares them out."""
    blocks = blocks_of(model, device)
    factors = [(side, n) for x in model for side, n in (("a", x.n_a), ("g", x.n_g))]
    part = -(-sum(n * n for _, n in factors) // blocks)
    again = {"a": 0, "g": 0}
    for block in range(blocks):
        left = (chip_bytes(model, device) - ROOM) // FP32
        before = 0
        for side, n in factors:
            start, end = part * block - before, part * (block + 1) - before
            before += n * n
            if end <= 0 or start >= n * n:
                continue
            first = 0 if start <= 0 else -(-start // n)
            last = n if end >= n * n else -(-end // n)
            rows, pitch = last - first, -(-n // 4) * 4
            kept = min(rows, left // pitch)
            kept -= kept % 2 if kept < rows else 0
            left -= kept * pitch
            again[side] += (rows - kept) * n
    return again["a"], again["g"]


def _cuda_curvature(model: list[Layer], from_X: bool, device: Device = Device()) -> float:
    a, g = rows_read_again(model, device)
    floor = FLOOR["curvature_update_, minibatch" if from_X else "curvature_update_, ema"](model)
    # H_a's other rows are read in phases 3 and 4, H_g's in phase 4; X in both of its steps.
    return floor + FP32 * (2 * a + g) + (FP32 * sum(x.X for x in model) if from_X else 0)


def _cuda_kron(x: Layer) -> float:
    """Momentum; then both products, and the step: two by cuBLAS and a launch, or one launch."""
    small = max(x.n_g, x.n_a) <= counted.SMALL
    return x.n_g**2 + x.n_a**2 + (4 + (4 if small else 4 + 4)) * x.weights


CUDA = {
    "factor_ema_": _sum(lambda x: 2 * x.X + 1.5 * x.n_a**2),
    "curvature_update_, ema": lambda model: _cuda_curvature(model, False),
    "curvature_update_, minibatch": lambda model: _cuda_curvature(model, True),
    "kron_step_": _sum(_cuda_kron),
}


def launches(backend: str, what: str, model: list[Layer]) -> int:
    """Of one call for all layers."""
    op, _, action = what.partition(", ")
    M = [torch.empty(x.n_g, x.n_a, device="meta") for x in model]
    A, X = (M, []) if action == "ema" or op == "factor_ema_" else ([], M)
    return counted.ours(op, {"M": M, "H_g": M, "H_a": M, "A": A, "X": X}, backend)


def table() -> str:
    """The table of kbfgs_ext/ops/README.md."""
    lines = ["| | | floor, MB | CUDA: launches | MB | Triton: launches | MB |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for (name, sizes), what in itertools.product(AUTOENCODERS.items(), FLOOR):
        op, _, action = what.partition(", ")
        for x_bytes in (FP32, 2) if what in READING_X else (FP32,):
            model = layers(sizes, x_bytes=x_bytes)
            cells = [f"{FLOOR[what](model) / 1e6:.0f}"]
            for backend, moved in (("cuda", CUDA), ("triton", TRITON)):
                count = launches(backend, what, model)
                cells += [str(count), f"{moved[what](model) / 1e6:.0f}"]
            title = f"`{op}`" + (f", {action}" if action else "")
            title += ", 16-bit $X$" if x_bytes == 2 else ""
            lines.append(f"| {name.upper()} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)
