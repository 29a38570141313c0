"""Parts: what one call of an op takes, layers of one param group whose steps are alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

from kbfgs_ext.ops.spectral.api import workspace_size as polar_workspace
from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.factors import ActivationMatrix, Factor, Tensors
from kbfgs_ext.optim.hyper import DeviceScalars
from kbfgs_ext.optim.settings import Settings

STILL, TURNED, MOVED = range(3)  # how far a step of a part is: M has the gradient, [W, b] moved
KNOWN = 64  # lists of layers whose parts are kept: more where layers take turns in a model


@dataclasses.dataclass
class Group:
    """A param group of covered parameters: its options, its layers, its scalars on the device."""

    options: dict[str, Any]
    layers: list[CoveredLayer]
    scalars: DeviceScalars


F = TypeVar("F", bound=Factor)


class Blocks(Generic[F]):
    """The factors of one side of a part's layers: ``blocks["H_g"]`` is the list of their tensors,
    made once."""

    def __init__(self, factors: list[F]) -> None:
        self.factors = factors
        self._each: dict[str, Tensors] = {}

    def __getitem__(self, name: str) -> Tensors:
        tensors = self._each.get(name)
        if tensors is None:
            tensors = self._each[name] = [t for f in self.factors for t in f.blocks(name)]
        return tensors

    def __len__(self) -> int:
        return sum(factor.count for factor in self.factors)

    def split(self, tensors: Tensors) -> Tensors:
        """Tensors of the factors by their blocks."""
        both = zip(self.factors, tensors, strict=False)
        return [t for factor, s in both for t in (s.unbind() if factor.stack else (s,))]

    def has(self, name: str) -> bool:
        """Whether they keep such a tensor."""
        return name in self.factors[0].kept


@dataclasses.dataclass
class Lengths:
    """The sizes of the steps of a part's layers, and of their groups."""

    whole: torch.Tensor  # all of them
    roots: torch.Tensor  # of the rows that each is of
    each: Tensors  # by the layer: a scalar, or a vector over its groups
    one: torch.Tensor  # a size


class Part:
    """Layers that one call of an op takes: of one param group, and alike in this step.

    ``part["P"]`` is the list of their tensors, made once; ``part.a["H_a"]``, ``part.g["H_g"]`` are
    those of the blocks of their sides.

    Args:
        group, layers, settings: theirs.
        in_rows: whether the inputs of all layers are rows, as far as they are asked for.
    """

    def __init__(
        self, group: Group, layers: list[CoveredLayer], settings: Settings, in_rows: bool = True
    ) -> None:
        self._group = group
        self.group, self.scalars = group.options, group.scalars
        self.layers, self.settings, self.backend = layers, settings, settings.backend
        self.in_rows = in_rows
        first = layers[0]
        self.bare, self.halved = first.bare, first.halved
        self.whole = all(layer.whole for layer in layers)  # no side is in several blocks
        self.plain = all(layer.plain for layer in layers)  # and no layer in groups
        self.gradient = type(first.gradients[0])
        self.a: Blocks[ActivationMatrix] = Blocks(
            [factor for layer in layers for factor in layer.activations]
        )
        self.g = Blocks([factor for layer in layers for factor in layer.gradients])
        self.stage = STILL
        self.scratch: Tensors = []  # of `Parts.scratch`, once it was asked for
        self._each: dict[str, Tensors] = {}
        self._lengths: Lengths | None = None
        self._singles: list[Part] = []
        self.mine = self._some([layer.mine for layer in layers])  # that this rank makes P of
        self.here = self._some([layer.rows > 0 for layer in layers])  # that it has rows of
        self.wide = self._some([not layer.tall for layer in layers])
        self.tall = self._some([layer.tall for layer in layers])

    def __getitem__(self, name: str) -> Tensors:
        tensors = self._each.get(name)
        if tensors is None:
            tensors = self._each[name] = [layer[name] for layer in self.layers]
        return tensors

    def _some(self, wanted: list[bool]) -> Part | None:
        """The part of those layers; None where there are none."""
        if all(wanted):
            return self
        layers = [layer for layer, one in zip(self.layers, wanted, strict=True) if one]
        return Part(self._group, layers, self.settings, self.in_rows) if layers else None

    def one_by_one(self) -> list[Part]:
        """A part of each layer alone."""
        if not self._singles:
            alone = [Part(self._group, [x], self.settings, self.in_rows) for x in self.layers]
            self._singles = alone if len(alone) > 1 else [self]
        return self._singles

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

    def given(self) -> tuple[Tensors, Tensors, Tensors, Tensors, float]:
        """What M takes in in this step: dW, db, W, b, and the decay that the gradients are
        without."""
        decay = self.group["weight_decay"]
        if self.layers[0].shard is not None:  # gathered, with it
            return self["dW"], self["db"], self["dW"], self["db"], 0.0
        # A frozen half of a layer has no gradient: the other's decay is then put in beforehand.
        inside = decay if self.halved else 0.0
        return self.dW(inside), self.db(inside), self.W(), self.b(), decay - inside

    def products(self, scratch: Tensors) -> Tensors:
        """The product scratch, n_g x n_a each."""
        shapes = [(layer.n_g, layer.n_a) for layer in self.layers]
        return [t[: n * k].view(n, k) for t, (n, k) in zip(scratch, shapes, strict=True)]

    def matrices(self, P: Tensors) -> Tensors:
        """The directions of layers and groups, but for those of one row each."""
        if self.plain:
            return P
        both = zip(self.layers, P, strict=True)
        return [t for layer, p in both if not layer.rowwise for t in layer.by_group(p)]

    def polar_scratch(self, scratch: Tensors) -> Tensors:
        """What the polar factors of `matrices` are made in."""
        if self.plain:
            return scratch
        found: Tensors = []
        for layer, t in zip(self.layers, scratch, strict=True):
            if layer.rowwise:
                continue
            if layer.groups == 1 or t.is_cpu:
                found += [t] * layer.groups
            else:
                found += t.split(len(t) // layer.groups)[: layer.groups]
        return found

    # ------------------------------------------------------------------ blocks

    def by_group(self, tensors: Tensors) -> Tensors:
        """What every layer has over its outputs, or its inputs, by the groups."""
        return self._split(tensors, CoveredLayer.by_group)

    def outputs(self, tensors: Tensors) -> Tensors:
        """What every layer has over its outputs that are here, by their groups."""
        return self._split(tensors, CoveredLayer.outputs_here)

    def to_outputs(self, vectors: Tensors) -> Tensors:
        """Vectors over the inputs, each for a group of `outputs`."""
        return self._split(vectors, CoveredLayer.inputs_here)

    def _split(
        self, tensors: Tensors, groups_of: Callable[[CoveredLayer, torch.Tensor], Tensors]
    ) -> Tensors:
        if self.plain:
            return tensors
        both = zip(self.layers, tensors, strict=True)
        return [t for layer, whole in both for t in groups_of(layer, whole)]

    def rows(self, matrices: Tensors) -> Tensors:
        """Matrices as large as the weights by the blocks of the gradient side."""
        if self.whole:
            return self.by_group(matrices)
        return [
            t[g.rows]
            for layer, m in zip(self.layers, matrices, strict=True)
            for g, t in itertools.product(layer.gradients, layer.by_group(m))
        ]

    def columns(self, matrices: Tensors) -> Tensors:
        """The same by the blocks of the activation side."""
        if self.whole:
            return self.by_group(matrices)
        return [
            t[:, a.rows]
            for layer, m in zip(self.layers, matrices, strict=True)
            for a, t in itertools.product(layer.activations, layer.by_group(m))
        ]

    def tiles(self, matrices: Tensors) -> Tensors:
        """The same by both: one tile for every pair of blocks of a layer, or of a group."""
        if self.whole:
            return self.by_group(matrices)
        return [
            t[g.rows, a.rows]
            for layer, m in zip(self.layers, matrices, strict=True)
            for g, a in itertools.product(layer.gradients, layer.activations)
            for t in layer.by_group(m)
        ]

    def tile_factors(self) -> tuple[Tensors, Tensors]:
        """H_g and H_a of every tile."""
        if self.whole:
            return self.g["H_g"], self.a["H_a"]
        pairs = [
            pair
            for layer in self.layers
            for g, a in itertools.product(layer.gradients, layer.activations)
            for pair in zip(g.blocks("H_g"), a.blocks("H_a"), strict=True)
        ]
        return [H_g for H_g, _ in pairs], [H_a for _, H_a in pairs]

    def lam_a(self) -> Tensors:
        """The dampings of the activation side's blocks: scalars on the device."""
        relative = self.settings.relative_damping
        return self.a["lam_a"] if relative else [self.scalars.lam_a] * len(self.a)

    def lam_g(self) -> Tensors:
        """Those of the gradient side's."""
        return [self.scalars.lam_g] * len(self.g)

    def lengths(self) -> Lengths:
        """Of their steps, a place for each."""
        if self._lengths is None:
            like, groups = self.scalars.step_size, [layer.groups for layer in self.layers]
            rows = [layer.n_g // layer.groups for layer in self.layers]
            roots = [like.new_full((k,), n**0.5) for n, k in zip(rows, groups, strict=True)]
            whole, one = like.new_empty(sum(groups)), like.new_ones(())
            each = [s if k > 1 else s[0] for s, k in zip(whole.split(groups), groups, strict=True)]
            self._lengths = Lengths(whole, torch.cat(roots), each, one)
        return self._lengths

    def inputs(self) -> list[Any]:
        """What their observers have kept, by the blocks of the activation side."""
        return [inputs for layer in self.layers for inputs in layer.inputs()]

    def X(self) -> Tensors:
        """The same as matrices, where the part is ``in_rows``."""
        return [rows.X for rows in self.inputs()]

    def look(self) -> None:
        """Before a step: 32-bit copies become the parameters where those are not their rounding, at
        first, and where someone else has changed them."""
        for layer in self.layers:
            for p, copy in layer.copies():
                copy.copy_(torch.where(copy.to(p.dtype) == p, copy, p.to(copy.dtype)))

    def written(self) -> None:
        """Round 32-bit copies to the parameters, and tell autograd that these have changed: kernels
        write behind its back."""
        if copies := [pair for layer in self.layers for pair in layer.copies()]:
            torch._foreach_copy_([p for p, _ in copies], [copy for _, copy in copies])
        for layer in self.layers:
            layer.put_back()
        torch.autograd.graph.increment_version(
            [p for layer in self.layers for p in layer.parameters()]
        )


def of_mine(parts: list[Part]) -> list[Part]:
    """Their layers that this rank makes P of."""
    return [part.mine for part in parts if part.mine is not None]


class Parts:
    """The parts that lists of layers fall into, kept from step to step, and the scratch that all
    layers share. A part ends where its P have ``piece`` elements."""

    def __init__(self, settings: Settings, device: torch.device, piece: int | None = None) -> None:
        self.groups: list[Group] = []
        self.layers: list[CoveredLayer] = []  # of all groups
        self.slopes = torch.empty(0, device=device)  # those of all layers, for one sum
        self._settings, self._device = settings, device
        self._piece = None if settings.step_length == "balanced" else piece  # that is of all
        self._known: dict[tuple, list[Part]] = {}
        self._product = torch.empty(0, device=device)
        self._made = 0  # layers that have their tensors

    def add(self, group: Group) -> None:
        """Take in one more group of layers."""
        self.groups.append(group)
        self.layers += group.layers

    def materialize(self) -> None:
        """Allocate what is not there yet."""
        if self._made == len(self.layers):
            return
        for layer in self.layers:
            layer.allocate()
        size = product_scratch_elements(self.layers, self._settings, self._device)
        self._product = torch.empty(size, dtype=self.layers[0].dtype, device=self._device)
        self.slopes = torch.cat([layer["slope"] for layer in self.layers])
        rows = [layer.rows for layer in self.layers]
        for layer, part in zip(self.layers, self.slopes.split(rows), strict=True):
            layer.scratch["slope"] = part
        self._known.clear()
        self._made = len(self.layers)

    def of(self, layers: list[CoveredLayer], by_inputs: bool = False) -> list[Part]:
        """``layers`` by param group, and within one by what their step is made of;
        ``by_inputs``: and by whether their inputs are rows."""
        rows = [not by_inputs or x.observer.in_rows for x in layers]
        key = tuple([(id(x), x.bare, x.halved, r) for x, r in zip(layers, rows, strict=True)])
        parts = self._known.get(key)
        if parts is None:
            if len(self._known) > KNOWN:
                self._known.clear()
            places = {id(x): r for x, r in zip(layers, rows, strict=True)}
            parts = self._known[key] = list(self._divide(places))
        return parts

    def _divide(self, rows: dict[int, bool]) -> Iterator[Part]:
        for group in self.groups:
            alike: dict[tuple, list[CoveredLayer]] = {}
            for layer in group.layers:
                if id(layer) in rows:
                    fusible = layer.plain or not self._settings.fused
                    key = rows[id(layer)], fusible, layer.bare, layer.halved
                    alike.setdefault(key, []).append(layer)
            for (in_rows, *_), layers in alike.items():
                for some in self._pieces(layers):
                    yield Part(group, some, self._settings, in_rows)

    def _pieces(self, layers: list[CoveredLayer]) -> Iterator[list[CoveredLayer]]:
        piece: list[CoveredLayer] = []
        for layer in layers:
            piece.append(layer)
            elements = sum(x.n_g * x.n_a for x in piece)
            if self._piece is not None and elements >= self._piece:
                yield piece
                piece = []
        if piece:
            yield piece

    def scratch(self, part: Part) -> Tensors:
        """Each layer's part of the scratch that the direction needs, flat."""
        alone, at = self._device.type == "cpu", 0
        for layer in part.layers if not part.scratch else []:
            size = direction_elements(layer, self._settings) if layer.mine else 0
            part.scratch.append(self._product[at : at + size])
            at += 0 if alone else size
        return part.scratch


def direction_elements(layer: CoveredLayer, settings: Settings) -> int:
    """Elements of scratch that a layer's direction needs: a matrix as large as P for the product
    H_g M H_a, and what the polar factor is made in."""
    product = layer.n_g * layer.n_a
    if settings.direction == "spectral":
        # On the CPU groups go one after the other, as layers do.
        at_once = 1 if layer.weight.device.type == "cpu" else layer.groups
        at_once = 0 if layer.rowwise else at_once
        product = max(product, at_once * polar_workspace(layer.n_g // layer.groups, layer.n_a))
    return product


def product_scratch_elements(
    layers: list[CoveredLayer], settings: Settings, device: torch.device
) -> int:
    """Elements of the direction's scratch: shared by all layers on the CPU, where they go one after
    the other; one each on a GPU, where they go at once."""
    sizes = [direction_elements(layer, settings) for layer in layers if layer.mine]
    return max(sizes, default=0) if device.type == "cpu" else sum(sizes)
