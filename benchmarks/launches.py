"""How many kernels a call launches on a GPU: ``ours(op, args, backend)``, ``torchs(func, args)``.

Only shapes are looked at, and which factors are the same. Ours are held to the launchers
themselves by tests/triton and tests/cuda_host (test_launches.py). Of torch's ops each is one
kernel, but for what is listed here; a product that cuBLAS splits along its depth has one more,
which is not reckoned with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

PER_LAUNCH = 64  # layers: kLayersPerLaunch in csrc/common/launch_shape.h
SMALL = 128  # largest side of a layer whose direction is one launch: small_step_cuda.cu

Arguments = dict[str, Any]


def ours(op: str, args: Arguments, backend: str) -> int:
    """Of one call of ``op``, on "cuda" or "triton"."""
    lists = [arg for arg in args.values() if isinstance(arg, (list, tuple)) and _tensors(arg)]
    count = max(map(len, lists), default=0)
    if not count:
        return 0
    counted = {"cuda": _CUDA, "triton": _TRITON}[backend].get(op)
    if counted is not None:
        return counted(args)
    if backend == "cuda":
        return _tables(count)
    return count if op in ("admit_", "judge_", "lengths_") else 1


def _tables(count: int) -> int:
    """Launches of a CUDA kernel for so many layers, or blocks."""
    return math.ceil(count / PER_LAUNCH)


def _iterations(args: Arguments) -> int:
    return len(args["coefficients"]) // 3


def _kron_products(args: Arguments) -> int:
    """One of cuBLAS for every factor of a large layer, or of its tiles: those that share a factor
    are one product (panels.h). One launch for all that are small."""
    large = [max(M.shape) > SMALL for M in args["M"]]
    factors = {
        (side, H.data_ptr() or id(H))
        for side in ("H_g", "H_a")
        for H, counts in zip(args[side], large, strict=False)  # one side may be left out
        if counts
    }
    return len(factors) + _tables(len(large) - sum(large))


def _kron_step(args: Arguments) -> int:
    return _tables(len(args["M"])) + _kron_products(args) + _tables(_large(args))


def _large(args: Arguments) -> int:
    return sum(max(M.shape) > SMALL for M in args["M"])


def _cuda_polar(args: Arguments) -> int:
    t = _iterations(args)
    return (t + 4) * _tables(len(args["P"])) + (4 * t - 1) * len(args["P"])


_CUDA: dict[str, Callable[[Arguments], int]] = {
    "bfgs_update_": lambda a: (1 if a["Hy"] else 2) * _tables(len(a["s"])),
    "double_damping_": lambda a: (3 if a["H"] else 1) * _tables(len(a["s"])),
    "kron_precondition_": _kron_products,
    "kron_step_": _kron_step,
    "polar_": _cuda_polar,
}
_TRITON: dict[str, Callable[[Arguments], int]] = {
    "factor_ema_": lambda a: 2 if a["A"] else 1,
    "hessian_action_": lambda a: 2,
    "bfgs_update_": lambda a: 2,
    "double_damping_": lambda a: 3 if a["H"] else 1,
    "curvature_update_": lambda a: 5 if a["X"] else 4,
    "lbfgs_two_loop_": lambda a: 3 if a["form"] == "compact" else 1,
    "kron_precondition_": lambda a: bool(a["H_g"]) + bool(a["H_a"]),
    "kron_step_": lambda a: 4,
    "polar_": lambda a: 3 * _iterations(a) + 4 - (_iterations(a) == 1),
}

# Of torch's multi-tensor launches, by the number of lists that an op has.
MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
MOST_CHUNKS, CHUNK = 320, 65536  # chunks of a launch, elements of a chunk


def torchs(func: Any, args: tuple) -> int:
    """Of one op of torch's, which computes something."""
    name = func._opname
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and _tensors(arg)]
    chunks = sum(math.ceil(t.numel() / CHUNK) for t in lists[0])
    depth = min(len(lists) + (not name.endswith("_") and "norm" not in name), 5)
    count = max(math.ceil(len(lists[0]) / MOST_TENSORS[depth]), math.ceil(chunks / MOST_CHUNKS))
    # A norm sets its partial sums to 0, makes them, and sums them up.
    return count + 2 if "norm" in name else count


def _tensors(values: Any) -> bool:
    return bool(values) and isinstance(values[0], torch.Tensor)
