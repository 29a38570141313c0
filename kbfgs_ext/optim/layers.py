"""Layer kinds: what a layer looks like to the algorithm.

A kind turns a module's input into rows X (the column of ones is implied), and its weight and weight
gradient into matrices d_out x d_in. A new kind of layer is one small class here, added to `KINDS`;
nothing outside this file asks a module for its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Linear:
    """`torch.nn.Linear` on inputs of any number of dimensions: (..., d_in) -> (..., d_out)."""

    module_type = nn.Linear

    @staticmethod
    def weight(module: Any) -> Any:
        """The weight: a parameter, unless something else computes it."""
        return module.weight

    @staticmethod
    def bias(module: Any) -> nn.Parameter | None:
        """The bias parameter, if the layer has one."""
        return module.bias

    @staticmethod
    def input_rows(x: torch.Tensor) -> torch.Tensor:
        """The input as m x d_in rows."""
        x = plain(x)
        return x.reshape(-1, x.shape[-1])

    @staticmethod
    def matrix(weight: torch.Tensor) -> torch.Tensor:
        """The weight, or a gradient of its shape, as d_out x d_in; writes reach the parameter."""
        return weight


KINDS = (Linear,)


def kind_of(module: nn.Module) -> type[Linear] | None:
    """The kind that covers ``module``, or None. Subclasses may compute anything: not covered."""
    for kind in KINDS:
        # NonDynamicallyQuantizableLinear is the plain Linear inside nn.MultiheadAttention, which
        # uses its weight without calling it; its hooks never fire, so it is left to the fallback.
        if type(module) is kind.module_type:
            return kind
    return None


def plain(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a dense tensor with the features last: out of torch.func's wrappers (vmap, grad,
    jvp), of nested tensors and of sparse ones."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        batch = functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else -1
        x = functorch.get_unwrapped(x)
        if batch >= 0:
            x = x.movedim(batch, 0)
    if x.is_nested:
        if x.layout is torch.jagged:
            return x.values()
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.unbind()])
    return x.to_dense() if x.layout is not torch.strided else x
