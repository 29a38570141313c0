"""Memory of the optimizer, counted from shapes: the same before and after training starts.

The fallback's, and the copies of large buffers, are counted as they are at present.
"""

from __future__ import annotations

import math

import torch

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.fallback import Fallback
from kbfgs_ext.optim.parts import product_scratch_elements
from kbfgs_ext.optim.passes import Buffers
from kbfgs_ext.optim.settings import Settings

FACTORS = ("A", "H_a", "H_g", "S", "Y")
MATRICES = (*FACTORS, "M", "P", "ahead", "saved", "dW", "master_W")


def memory_usage(
    layers: list[CoveredLayer], settings: Settings, fallback: Fallback | None, buffers: Buffers
) -> dict[str, int]:
    """Bytes by kind, and their "total".

    Kinds are the names of `CoveredLayer` and its factors; "vectors" are all tensors of one
    dimension, "product" is the scratch of the direction, "fallback" the fallback's state and copies
    as they are at present, "buffers" the copies of the model's buffers.
    """
    usage: dict[str, int] = {}

    def add(kind: str, elements: int, dtype: torch.dtype) -> None:
        usage[kind] = usage.get(kind, 0) + elements * dtype.itemsize

    for layer in layers:
        kept = layer.kept_shapes()
        for name, (shape, dtype) in kept.items():
            kind = name.partition(".")[0]  # of a block
            add(kind if kind in MATRICES else "vectors", math.prod(shape), dtype)
        for name, shape in layer.scratch_shapes().items():
            add(name if name in MATRICES else "vectors", math.prod(shape), layer.dtype)
        if not layer.in_place and "master_W" not in kept:
            add("W", layer.rows * layer.d_in, layer.weight.dtype)
    first = layers[0]
    add("product", product_scratch_elements(layers, settings, first.weight.device), first.dtype)
    usage["fallback"] = 0 if fallback is None else fallback.bytes()
    usage["buffers"] = buffers.bytes()
    usage["total"] = sum(usage.values())
    return usage
