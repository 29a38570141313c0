"""Layer kinds: what a layer looks like to the algorithm.

A kind turns a module's input into rows X (the column of ones is implied), its output into rows h,
and its weight and weight gradient into matrices d_out x d_in. A new kind of layer is one small
class here, added to `KINDS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Linear:
    """`torch.nn.Linear` on inputs of any number of dimensions: (..., d_in) -> (..., d_out)."""

    module_type = nn.Linear

    @staticmethod
    def weight(module: Any) -> nn.Parameter:
        """The weight parameter."""
        return module.weight

    @staticmethod
    def bias(module: Any) -> nn.Parameter | None:
        """The bias parameter, if the layer has one."""
        return module.bias

    @staticmethod
    def input_rows(module: Any, x: torch.Tensor) -> torch.Tensor:
        """The input as m x d_in rows."""
        return x.reshape(-1, module.in_features)

    @staticmethod
    def output_rows(module: Any, h: torch.Tensor) -> torch.Tensor:
        """The output, or a gradient of its shape, as m x d_out rows."""
        return h.reshape(-1, module.out_features)

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
