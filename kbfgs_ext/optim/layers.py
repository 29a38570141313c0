"""Layer kinds: what a module looks like to the algorithm.

A kind yields the *views* of a module: the matrices in it, each with its bias, and how a module's
input becomes rows. A new kind of layer is one small class, handed to `register_kind`; nothing
outside this file asks a module for its weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kbfgs_ext.optim.inputs import Inputs, Spread, Window, features_last
from kbfgs_ext.optim.shards import type_of

Transform = Callable[[torch.Tensor], torch.Tensor]


def whole(t: torch.Tensor) -> torch.Tensor:
    """A tensor as it is."""
    return t


@dataclasses.dataclass(frozen=True)
class View:
    """One matrix of a module: h = W x + b on every row x.

    Args:
        weight: the parameter that holds W, unless something else computes it.
        bias: the parameter that holds b, if there is one. Without one that is trained h must be
            the module's output: a zero bias is added there.
        inputs: the input as rows of d_in.
        outputs_first: a view of a tensor of the weight's shape, itself or a gradient, with the n_g
            outputs as the first dimension and the d_in inputs in all others.
        trailing: dimensions of the module's output that come after its n_g features.
        unit: inputs that stay in one block: what a kernel sees of a channel.
        rows: the outputs, where several views share a weight; None: all of them.
        bias_rows: those of a bias that several views share; None: as of the weight.
        name: of the view in its module, where that has several.
        sized: ``inputs`` takes the size of the output as well, its ``trailing`` dimensions.
        by_hand: the module calls `F.linear` with the weight itself, and the input is seen there.
        groups: of a convolution: the outputs are in as many equal runs, each of inputs of its own,
            d_in of them; ``outputs_first`` may then have the groups as a dimension before the
            outputs of one.
    """

    weight: Any
    bias: nn.Parameter | None
    inputs: Callable[..., Inputs] = features_last
    outputs_first: Transform = whole
    trailing: int = 0
    unit: int = 1
    rows: slice | None = None
    bias_rows: slice | None = None
    name: str = ""
    sized: bool = False
    by_hand: bool = False
    groups: int = 1

    @property
    def shape(self) -> torch.Size:
        """n_g x d_in."""
        return self.matrix(torch.empty(self.weight.shape, device="meta")).shape

    def place(self, t: torch.Tensor) -> torch.Tensor:
        """Where the matrix lies in a tensor of the weight's shape, outputs first."""
        t = self.outputs_first(t)
        return t if self.rows is None else t[self.rows]

    def flat(self, t: torch.Tensor) -> torch.Tensor:
        """What `place` returns as n_g x d_in."""
        return (t.flatten(0, 1) if t.dim() > self.weight.dim() else t).flatten(1)

    def matrix(self, t: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as n_g x d_in."""
        return self.flat(self.place(t))

    def vector(self, t: torch.Tensor) -> torch.Tensor:
        """A tensor of the bias's shape as n_g."""
        rows = self.bias_rows or self.rows
        return t if rows is None else t[rows]

    def write(self, t: torch.Tensor, matrix: torch.Tensor) -> None:
        """Put ``matrix``, n_g x d_in, into a tensor of the weight's shape."""
        place = self.place(t)
        place.copy_(matrix.reshape(place.shape))

    def see(self, x: torch.Tensor, output: torch.Tensor) -> Inputs:
        """The rows of one use."""
        return self.inputs(x, output.shape[-self.trailing :]) if self.sized else self.inputs(x)

    def spread(self, b: torch.Tensor) -> torch.Tensor:
        """A vector over the outputs as it is added to the module's output."""
        return b.view(-1, *[1] * self.trailing) if self.trailing else b


class Kind:
    """A kind of layer; `register_kind` takes one more.

    ``module_type`` is the type that it covers, or its name where importing it costs too much.
    Subclasses of that type may compute anything: they are not covered.
    """

    module_type: type[nn.Module] | str = nn.Linear

    @classmethod
    def covers(cls, module: nn.Module) -> bool:
        """Whether ``module`` is of this kind."""
        one = type_of(module)
        return one.__name__ == cls.module_type or one is cls.module_type

    @classmethod
    def refuses(cls, module: Any) -> str:
        """Why a module of this kind is not covered all the same; empty if it is."""
        return ""

    @classmethod
    def views(cls, module: Any) -> list[View]:
        """The module's matrices: by default the one of a weight d_out x d_in on (..., d_in)."""
        return [View(module.weight, module.bias)]


class Linear(Kind):
    """`torch.nn.Linear` on inputs of any number of dimensions: (..., d_in) -> (..., d_out)."""


class TransposedLinear(Kind):
    """transformers' `Conv1D`, a Linear whose weight is d_in x d_out."""

    module_type = "Conv1D"

    @classmethod
    def covers(cls, module: nn.Module) -> bool:
        if not super().covers(module):
            return False
        W, b = (module._parameters.get(name) for name in ("weight", "bias"))
        return W is not None and b is not None and W.shape[1:] == b.shape

    @classmethod
    def views(cls, module: Any) -> list[View]:
        return [View(module.weight, module.bias, outputs_first=torch.t)]


class Convolution(Kind):
    """`torch.nn.Conv2d`, with any stride, padding and dilation, on (B, C, H, W) or (C, H, W): the
    rows are patches, one per position of the kernel. Groups have a block of the factors each."""

    module_type: type[nn.Module] | str = nn.Conv2d

    @classmethod
    def views(cls, module: Any) -> list[View]:
        sizes = list(zip(module.kernel_size, module.dilation, strict=True))
        if module.padding == "same":  # what is odd goes behind
            around = [divmod(apart * (k - 1), 2) for k, apart in sizes]
            padding = [(half, half + odd) for half, odd in around]
        elif module.padding == "valid":
            padding = [(0, 0)] * len(sizes)
        else:
            padding = [(p, p) for p in module.padding]
        window = Window(
            kernel=module.kernel_size,
            stride=module.stride,
            dilation=module.dilation,
            padding=tuple(p for pair in reversed(padding) for p in pair),
            mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
            groups=module.groups,
        )
        return [
            View(
                module.weight,
                module.bias,
                window.images,
                trailing=len(sizes),
                unit=math.prod(module.kernel_size),
                groups=module.groups,
            )
        ]


class Convolution1d(Convolution):
    """`torch.nn.Conv1d`."""

    module_type = nn.Conv1d


class Convolution3d(Convolution):
    """`torch.nn.Conv3d`."""

    module_type = nn.Conv3d


class TransposedConvolution(Kind):
    """`torch.nn.ConvTranspose2d`: the rows are what reaches one pixel of the output."""

    module_type: type[nn.Module] | str = nn.ConvTranspose2d

    @classmethod
    def views(cls, module: Any) -> list[View]:
        geometry = module.kernel_size, module.stride, module.dilation, module.padding
        places = Spread(*geometry, module.groups)
        return [
            View(
                module.weight,
                module.bias,
                places.images,
                outputs_first=functools.partial(_swapped, groups=module.groups),
                trailing=len(module.kernel_size),
                unit=math.prod(module.kernel_size),
                sized=True,
                groups=module.groups,
            )
        ]


class TransposedConvolution1d(TransposedConvolution):
    """`torch.nn.ConvTranspose1d`."""

    module_type = nn.ConvTranspose1d


class TransposedConvolution3d(TransposedConvolution):
    """`torch.nn.ConvTranspose3d`."""

    module_type = nn.ConvTranspose3d


def _swapped(t: torch.Tensor, groups: int) -> torch.Tensor:
    """Inputs x outputs of a group x kernel as groups x outputs x inputs of a group x kernel."""
    return t.unflatten(0, (groups, -1)).transpose(1, 2)


class MultiheadAttention(Kind):
    """`torch.nn.MultiheadAttention`: the projections of queries, keys and values, in one weight or
    in three, and that of the output."""

    module_type = nn.MultiheadAttention

    @classmethod
    def views(cls, module: Any) -> list[View]:
        E, bias = module.embed_dim, module.in_proj_bias
        found = []
        for i, name in enumerate("qkv"):
            rows, weight = slice(i * E, (i + 1) * E), module.in_proj_weight
            if weight is not None:
                found.append(View(weight, bias, rows=rows, name=name, by_hand=True))
            else:
                weight = getattr(module, f"{name}_proj_weight")
                found.append(View(weight, bias, bias_rows=rows, name=name, by_hand=True))
        out = module.out_proj
        return [*found, View(out.weight, out.bias, name="out_proj", by_hand=True)]


KINDS: list[type[Kind]] = [
    Linear,
    TransposedLinear,
    Convolution1d,
    Convolution,
    Convolution3d,
    TransposedConvolution1d,
    TransposedConvolution,
    TransposedConvolution3d,
    MultiheadAttention,
]


def register_kind(kind: type[Kind]) -> type[Kind]:
    """Cover one more kind of layer, in optimizers made from now on; a decorator of its class.

    Raises:
        TypeError: ``kind`` is no subclass of `Kind`, or its ``module_type`` is no type of module
            and no name.
    """
    if not (isinstance(kind, type) and issubclass(kind, Kind)):
        raise TypeError(f"kind must be a subclass of kbfgs_ext.Kind, got {kind!r}")
    of = kind.module_type
    if not isinstance(of, str) and not (isinstance(of, type) and issubclass(of, nn.Module)):
        raise TypeError(f"{kind.__name__}.module_type must be a type of module, got {of!r}")
    KINDS.insert(0, kind)
    return kind


def kind_of(module: nn.Module) -> type[Kind] | None:
    """The kind that covers ``module``, or None; of two the one registered last."""
    return next((kind for kind in KINDS if kind.covers(module)), None)


def views(module: nn.Module) -> list[View]:
    """The matrices of a module of a known kind; of any other none."""
    kind = kind_of(module)
    return [] if kind is None or kind.refuses(module) else kind.views(module)


def why_not(module: nn.Module) -> str:
    """Why a module is not covered."""
    name, kind = type_of(module).__name__, kind_of(module)
    if kind is not None:
        return kind.refuses(module) or f"it is no matrix of its {name}"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its nn.MultiheadAttention is not covered"
    for kind in KINDS:
        if isinstance(kind.module_type, type) and isinstance(module, kind.module_type):
            return f"{name} is a subclass of {kind.module_type.__name__}: register_kind covers it"
    return f"{name} is no kind of layer that is covered"
