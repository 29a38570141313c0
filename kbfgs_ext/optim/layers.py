"""Layer kinds: what a module looks like to the algorithm.

A kind yields the *views* of a module: the matrices in it, each with its bias, and how a module's
input becomes rows. A new kind of layer is one small class here, added to `KINDS`; nothing outside
this file asks a module for its weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Transform = Callable[[torch.Tensor], torch.Tensor]


def whole(t: torch.Tensor) -> torch.Tensor:
    """A tensor as it is."""
    return t


def features_last(x: torch.Tensor) -> torch.Tensor:
    """An input (..., d_in) as m x d_in rows."""
    x = plain(x)
    return x.reshape(-1, x.shape[-1])


@dataclasses.dataclass(frozen=True)
class View:
    """One matrix of a module: h = W x + b on every row x.

    Args:
        weight: the parameter that holds W, unless something else computes it.
        bias: the parameter that holds b, if there is one.
        rows: the module's input as rows, m x d_in.
        matrix: a tensor of the weight's shape, itself or a gradient, as n_g x d_in; writes to the
            result reach the tensor.
        vector: a tensor of the bias's shape as (n_g,), likewise.
    """

    weight: Any
    bias: nn.Parameter | None
    rows: Transform = features_last
    matrix: Transform = whole
    vector: Transform = whole

    @property
    def shape(self) -> torch.Size:
        """n_g x d_in."""
        return self.matrix(self.weight.detach()).shape


class Linear:
    """`torch.nn.Linear` on inputs of any number of dimensions: (..., d_in) -> (..., d_out)."""

    module_type = nn.Linear

    @staticmethod
    def views(module: Any) -> list[View]:
        """The layer's one matrix."""
        return [View(module.weight, module.bias)]


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
