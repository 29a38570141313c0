"""A covered layer: its parameters, its two factors, and the tensors of a step; and parts of many.

A `Part` is what one call of an op takes: layers of one param group whose steps are alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kbfgs_ext.ops.bfgs_update.api import workspace_size
from kbfgs_ext.optim.capture import Observer
from kbfgs_ext.optim.factors import (
    ActivationMatrix,
    Factor,
    GradientMatrix,
    Identity,
    PairRing,
    Shapes,
    Tensors,
)
from kbfgs_ext.optim.hyper import DeviceScalars
from kbfgs_ext.optim.layers import View
from kbfgs_ext.optim.settings import Settings

KNOWN = 64  # lists of layers whose parts are kept: more where layers take turns in a model
ACCUMULATION = torch.float32  # factors of 16-bit parameters are kept in this dtype


class CoveredLayer:
    """One matrix of the model, with all that the method keeps for it.

    ``kept`` is what a checkpoint holds: M (n_g x n_a), the momentum, and what the factors keep.
    ``scratch`` lives from one half of a step to the other.
    """

    def __init__(self, name: str, uses: list[tuple[nn.Module, View]], settings: Settings) -> None:
        self.name = name
        self.uses = uses  # all modules that use the weight, with the view of it that each has
        self.view = view = uses[0][1]
        self.weight: nn.Parameter = view.weight
        self.bias = view.bias if view.bias is not None and view.bias.requires_grad else None
        n_g, d_in = view.shape
        self.n_g, self.d_in, self.n_a = n_g, d_in, d_in + (self.bias is not None)
        self.observer = Observer(name, view, self.bias)
        a_kind: type[Factor] = ActivationMatrix if settings.fits(self.n_a) else Identity
        g_kind: type[Factor] = GradientMatrix if settings.fits(n_g) else Identity
        if settings.memory is not None:
            g_kind = PairRing  # there is no matrix to be large
        self.activation, self.gradient = a_kind("a", self.n_a, settings), g_kind("g", n_g, settings)
        self.started = False  # H_a is the inverse factor, no longer the average
        self.warm_batches = 0  # averaged into the factor by warm_start so far
        self.moving: list[nn.Parameter] = []  # the parameters that this step moves
        self.bare = False  # this step goes without factors: the layer's input was never seen
        self.kept: dict[str, torch.Tensor] = {}
        self.scratch: dict[str, torch.Tensor] = {}
        self._no_bias = torch.empty(0)

    # ------------------------------------------------------------------ tensors

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors: the weight's, but never less than 32 bits."""
        return torch.promote_types(self.weight.dtype, ACCUMULATION)

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """Of the activation and of the gradient side."""
        return self.activation, self.gradient

    def left_out(self) -> list[str]:
        """The sides without a factor, for people."""
        return [f"n_{factor.side} {factor.n}" for factor in self.factors if not factor.live]

    def kept_shapes(self) -> Shapes:
        """Shape and dtype of every kept tensor."""
        M: Shapes = {"M": ((self.n_g, self.n_a), self.dtype)}
        a, g = (factor.kept_shapes(self.dtype) for factor in self.factors)
        return M | a | g

    def scratch_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every scratch tensor, but for the product scratch that all layers share."""
        n_a, n_g = self.n_a, self.n_g
        shapes: dict[str, tuple[int, ...]] = {
            "P": (n_g, n_a),
            "work": (workspace_size(n_a, n_g),),
        }
        shapes |= dict.fromkeys(("a_bar", "a_bar_next"), (n_a,))
        g = ("slope", "h_origin", "h_change", "g_bar", "g_bar_next")
        shapes |= dict.fromkeys(g, (n_g,))
        return shapes | self.activation.scratch_shapes() | self.gradient.scratch_shapes()

    def allocate(self) -> None:
        """Make the tensors, on the weight's device; the ones that exist stay."""
        device = self.weight.device
        if not self.kept:
            for name, (shape, dtype) in self.kept_shapes().items():
                self.kept[name] = torch.zeros(shape, dtype=dtype, device=device)
            for factor in self.factors:
                factor.kept = {name: self.kept[name] for name in factor.kept_shapes(self.dtype)}
                factor.clear()
        if not self.scratch:
            for name, shape in self.scratch_shapes().items():
                self.scratch[name] = torch.zeros(shape, dtype=self.dtype, device=device)
            self.scratch["saved"] = self.scratch["P"]  # descend_ leaves [W, b] of before there
            for name in ("a_bar", "a_bar_next"):
                self.scratch[name][self.d_in :] = 1.0  # the mean of the column of ones
            self._no_bias = torch.empty(0, dtype=self.weight.dtype, device=device)

    def reset(self) -> None:
        """Back to before the start; what is counted stays."""
        self.kept["M"].zero_()
        for factor in self.factors:
            factor.reset()
        self.started, self.warm_batches = False, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.kept.get(name)
        return self.scratch[name] if tensor is None else tensor

    def has(self, name: str) -> bool:
        """Whether the kept tensor exists, once they are allocated."""
        return name in self.kept

    # ------------------------------------------------------------------ parameters, as the ops
    # want them: matrices, and empty for no bias

    def parameters(self) -> list[nn.Parameter]:
        """The covered parameters: the weight, and the bias where it is trained."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def W(self) -> torch.Tensor:
        """The weight, n_g x d_in; where it lies otherwise in memory a copy, for `put_back`."""
        W = self.view.matrix(self.weight.detach())
        if self.view.in_place:
            return W
        if "W" not in self.scratch or self.scratch["W"].dtype != W.dtype:
            self.scratch["W"] = torch.empty_like(W, memory_format=torch.contiguous_format)
        return self.scratch["W"].copy_(W)

    def put_back(self) -> None:
        """After an op has written `W`: let the weight have it."""
        if not self.view.in_place:
            self.view.write(self.weight.detach(), self.scratch["W"])

    def b(self) -> torch.Tensor:
        """The bias, or an empty tensor."""
        return self._no_bias if self.bias is None else self.bias.detach()

    def dW(self, decay: float = 0.0) -> torch.Tensor:
        """The weight's gradient plus ``decay*W``, n_g x d_in; zero where it is frozen."""
        return self.view.matrix(self._gradient(self.weight, "no_dW", decay)).contiguous()

    def db(self, decay: float = 0.0) -> torch.Tensor:
        """The bias's gradient, as the weight's; or an empty tensor."""
        if self.bias is None:
            return self._no_bias
        return self._gradient(self.bias, "no_db", decay)

    def _gradient(self, p: nn.Parameter, zero: str, decay: float) -> torch.Tensor:
        if any(p is moved for moved in self.moving):
            assert p.grad is not None
            return p.grad.add(p.detach(), alpha=decay) if decay else p.grad
        if zero not in self.scratch or self.scratch[zero].dtype != p.dtype:
            self.scratch[zero] = torch.zeros_like(p, requires_grad=False)
        return self.scratch[zero]

    # ------------------------------------------------------------------ in a step

    def look(self) -> None:
        """After the first pass: which parameters move, those with a new gradient that want one."""
        self.moving = [
            p
            for p in self.parameters()
            if p.grad is not None and p.requires_grad and not self.observer.is_stale(p)
        ]
        if self.moving:
            self.observer.settle()
        self.bare = not self.started and not self.observer.seen

    @property
    def halved(self) -> bool:
        """Whether this step moves the weight or the bias alone: the other is frozen."""
        return len(self.moving) < len(self.parameters())

    def hold(self) -> None:
        """Put the frozen half of a layer back after a step, bit for bit."""
        moving = {id(p) for p in self.moving}
        saved = self.scratch["saved"]
        if id(self.weight) not in moving:
            self.view.write(self.weight.detach(), saved[:, : self.d_in])
        if self.bias is not None and id(self.bias) not in moving:
            self.b().copy_(saved[:, self.d_in])


@dataclasses.dataclass
class Group:
    """A param group of covered parameters: its options, its layers, its scalars on the device."""

    options: dict[str, Any]
    layers: list[CoveredLayer]
    scalars: DeviceScalars


class Part:
    """Layers that one call of an op takes: of one param group, and alike in this step.

    ``part["H_g"]`` is the list of their tensors, made once.

    Args:
        group, layers, settings: theirs.
        in_rows: whether the inputs of all layers are rows, as far as they are asked for.
    """

    def __init__(
        self, group: Group, layers: list[CoveredLayer], settings: Settings, in_rows: bool = True
    ) -> None:
        self.group, self.scalars = group.options, group.scalars
        self.layers, self.settings, self.backend = layers, settings, settings.backend
        self.in_rows = in_rows
        first = layers[0]
        self.bare, self.halved = first.bare, first.halved
        self.activation: type[Factor] = Identity if self.bare else type(first.activation)
        self.gradient: type[Factor] = Identity if self.bare else type(first.gradient)
        self._each: dict[str, Tensors] = {}

    def __getitem__(self, name: str) -> Tensors:
        tensors = self._each.get(name)
        if tensors is None:
            tensors = self._each[name] = [layer[name] for layer in self.layers]
        return tensors

    def has(self, name: str) -> bool:
        """Whether the layers keep such a tensor."""
        return self.layers[0].has(name)

    def W(self) -> Tensors:
        """Their weights, n_g x d_in each."""
        return [layer.W() for layer in self.layers]

    def b(self) -> Tensors:
        """Their biases, empty where there is none."""
        return [layer.b() for layer in self.layers]

    def dW(self, decay: float = 0.0) -> Tensors:
        """Their weight gradients plus ``decay*W``."""
        return [layer.dW(decay) for layer in self.layers]

    def db(self, decay: float = 0.0) -> Tensors:
        """Their bias gradients plus ``decay*b``."""
        return [layer.db(decay) for layer in self.layers]

    def inputs(self) -> list[Any]:
        """What their observers have kept."""
        return [layer.observer.inputs() for layer in self.layers]

    def X(self) -> Tensors:
        """The same as matrices, where the part is ``in_rows``."""
        return [rows.X for rows in self.inputs()]

    def written(self) -> None:
        """Tell autograd that the parameters have changed: kernels write behind its back."""
        for layer in self.layers:
            layer.put_back()
        torch.autograd.graph.increment_version(
            [p for layer in self.layers for p in layer.parameters()]
        )


class Parts:
    """The parts that lists of layers fall into, kept from step to step, and the scratch that all
    layers share."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.groups: list[Group] = []
        self.layers: list[CoveredLayer] = []  # of all groups
        self.slopes = torch.empty(0)  # those of all layers, for one sum
        self._settings, self._device = settings, device
        self._known: dict[tuple, list[Part]] = {}
        self._product = torch.empty(0)

    def add(self, group: Group) -> None:
        """Take in one more group of layers."""
        self.groups.append(group)
        self.layers += group.layers

    def materialize(self) -> bool:
        """Allocate what is not there yet; whether there was something."""
        if all(layer.scratch for layer in self.layers) and self._product.numel():
            return False
        for layer in self.layers:
            layer.allocate()
        size = product_scratch_elements(self.layers, self._device)
        self._product = torch.empty(size, dtype=self.layers[0].dtype, device=self._device)
        self.slopes = torch.cat([layer["slope"] for layer in self.layers])
        rows = [layer.n_g for layer in self.layers]
        for layer, part in zip(self.layers, self.slopes.split(rows), strict=True):
            layer.scratch["slope"] = part
        self._known.clear()
        return True

    def of(self, layers: list[CoveredLayer], by_inputs: bool = False) -> list[Part]:
        """``layers`` by param group, and within one by the factors that their step has;
        ``by_inputs``: and by whether their inputs are rows."""
        rows = {id(x): not by_inputs or x.observer.in_rows for x in layers}
        key = tuple((id(x), x.bare, x.halved, rows[id(x)]) for x in layers)
        parts = self._known.get(key)
        if parts is None:
            if len(self._known) > KNOWN:
                self._known.clear()
            parts = self._known[key] = list(self._divide(rows))
        return parts

    def _divide(self, rows: dict[int, bool]) -> Iterator[Part]:
        for group in self.groups:
            alike: dict[tuple, list[CoveredLayer]] = {}
            for layer in group.layers:
                if id(layer) in rows:
                    kinds = tuple(type(factor) for factor in layer.factors)
                    key = rows[id(layer)], kinds, layer.bare, layer.halved
                    alike.setdefault(key, []).append(layer)
            for (in_rows, *_), layers in alike.items():
                yield Part(group, layers, self._settings, in_rows)

    def work(self, part: Part) -> Tensors:
        """Each layer's part of the product scratch, n_g x n_a; none for layers without an H_a."""
        if not part.activation.live:
            return []
        alone = self._device.type == "cpu"
        views, at = [], 0
        for layer in part.layers:
            size = layer.n_g * layer.n_a
            views.append(self._product[at : at + size].view(layer.n_g, layer.n_a))
            at += 0 if alone else size
        return views


def product_scratch_elements(layers: list[CoveredLayer], device: torch.device) -> int:
    """Elements of the scratch of P = H_g M H_a: shared by all layers on the CPU, where they go one
    after the other; one each on a GPU, where they go at once. Without an H_a none is needed."""
    sizes = [layer.n_g * layer.n_a for layer in layers if layer.activation.live]
    return max(sizes, default=0) if device.type == "cpu" else sum(sizes)
