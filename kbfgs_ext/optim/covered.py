"""A covered layer: its parameters, its factors, and the tensors of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from kbfgs_ext.ops.bfgs_update.api import workspace_size
from kbfgs_ext.optim.blocks import cut
from kbfgs_ext.optim.capture import Observer
from kbfgs_ext.optim.factors import ActivationMatrix, Factor, GradientMatrix, PairRing, Shapes
from kbfgs_ext.optim.inputs import Inputs
from kbfgs_ext.optim.layers import Transform, View
from kbfgs_ext.optim.settings import Settings
from kbfgs_ext.optim.shards import Shard, local

ACCUMULATION = torch.float32  # factors of 16-bit parameters are kept in this dtype
EVERYWHERE = ("A", "gamma")  # of the factors' tensors, what ranks have that do not own the layer


class CoveredLayer:
    """One matrix of the model, with all that the method keeps for it.

    ``kept`` is what a checkpoint holds: M (n_g x n_a), the momentum, and what the factors keep.
    ``scratch`` lives from one half of a step to the other. Of several ranks that share the work
    one owns the layer: M, the factors and P are made there. Of a weight that is sharded a rank has
    some rows, and moves these.
    """

    def __init__(self, name: str, uses: list[tuple[nn.Module, View]], settings: Settings) -> None:
        self.name = name
        self.uses = uses  # all modules that use the weight, with the view of it that each has
        self.view = view = uses[0][1]
        self.weight: nn.Parameter = view.weight
        self.bias = view.bias if view.bias is not None and view.bias.requires_grad else None
        n_g, d_in = view.shape
        # In groups n_g is that of all together, and d_in, n_a of each.
        self.n_g, self.d_in, self.n_a = n_g, d_in, d_in + (self.bias is not None)
        self.groups, stack = view.groups, (view.groups,) if view.groups > 1 else ()
        self.shard = Shard.of(name, view, self.bias)  # None: this rank has all of it
        self.here = view if self.shard is None else self.shard.view  # of what this rank has
        self.mine = True  # this rank makes the layer's P
        self.observer = Observer(name, view, self.bias)
        g_kind = GradientMatrix if settings.memory is None else PairRing
        a_rows = cut(
            self.n_a, settings.largest_block(view.trailing > 0), view.unit, self.n_a - d_in
        )
        g_rows = cut(n_g // self.groups, settings.largest_block())
        # The blocks of both sides.
        self.activations = [ActivationMatrix("a", rows, settings, stack) for rows in a_rows]
        self.gradients = [g_kind("g", rows, settings, stack) for rows in g_rows]
        self.tied = ""  # the embedding whose weight it is too
        self.started = False  # H_a is the inverse factor, no longer the average
        self.warm_batches = 0  # averaged into the factor by warm_start so far
        self.moving: list[nn.Parameter] = []  # the parameters that this step moves
        self.bare = False  # this step goes without factors: the layer's input was never seen
        self.kept: dict[str, torch.Tensor] = {}
        # Of the names of its tensors in a checkpoint, where the weight's other parts have theirs.
        self.prefix = f"{view.name}." if view.rows is not None else ""
        self.scratch: dict[str, torch.Tensor] = {}
        self._no_bias = torch.empty(0, device="cpu")
        self._aside = False  # the weight lies so in memory that ops work on a copy
        self._settings = settings

    # ------------------------------------------------------------------ tensors

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors: the weight's, but never less than 32 bits."""
        return torch.promote_types(self.weight.dtype, ACCUMULATION)

    @property
    def whole(self) -> bool:
        """Whether both sides are one block, or one of every group."""
        return len(self.activations) == len(self.gradients) == 1

    @property
    def plain(self) -> bool:
        """Whether both sides are one block."""
        return self.whole and self.groups == 1

    @property
    def tall(self) -> bool:
        """Whether there are more outputs than inputs, in a group."""
        return self.n_g // self.groups > self.n_a

    @property
    def rowwise(self) -> bool:
        """Whether every output is a group: the polar factor of a row is its direction."""
        return self.groups == self.n_g > 1

    def by_group(self, t: torch.Tensor) -> list[torch.Tensor]:
        """A matrix or vector over the outputs, or a vector over the inputs, of every group."""
        return [t] if self.groups == 1 else list(t.unflatten(0, (self.groups, -1)).unbind())

    def outputs_here(self, t: torch.Tensor) -> list[torch.Tensor]:
        """A matrix or vector over the outputs that are here, by their groups."""
        return self.by_group(t) if self.shard is None else [t[rows] for _, rows in self._runs()]

    def inputs_here(self, t: torch.Tensor) -> list[torch.Tensor]:
        """A vector over the inputs, of every group that has outputs here."""
        each = self.by_group(t)
        return each if self.shard is None else [each[group] for group, _ in self._runs()]

    def _runs(self) -> list[tuple[int, slice]]:
        """The groups that this rank has rows of, and which of its rows they have."""
        assert self.shard is not None
        size, here = self.n_g // self.groups, self.shard.here
        ends = {g: (g * size, (g + 1) * size) for g in range(here.start // size, self.groups)}
        return [
            (g, slice(max(a, here.start) - here.start, min(b, here.stop) - here.start))
            for g, (a, b) in ends.items()
            if a < here.stop
        ]

    def _blocks(self) -> Iterator[tuple[Factor, str]]:
        """Every factor, and what the names of its tensors end in: nothing for a side's only one."""
        for side in (self.activations, self.gradients):
            for i, factor in enumerate(side):
                yield factor, f".{i}" if len(side) > 1 else ""

    @property
    def rows(self) -> int:
        """How many of the n_g rows this rank has."""
        return self.n_g if self.shard is None else self.shard.length

    @property
    def in_place(self) -> bool:
        """Whether the weight lies in memory as `W` has it."""
        return self.here.place(local(self.weight)).is_contiguous()

    def _shapes_of(self, factor: Factor) -> Shapes:
        shapes = factor.kept_shapes(self.dtype)
        return {name: x for name, x in shapes.items() if self.mine or name in EVERYWHERE}

    def kept_shapes(self) -> Shapes:
        """Shape and dtype of every kept tensor."""
        M: Shapes = {"M": ((self.n_g, self.n_a), self.dtype)} if self.mine else {}
        if self._settings.master_weights and self.weight.dtype.itemsize == 2:
            M["master_W"] = ((self.n_g, self.d_in), self.dtype)
            if self.bias is not None:
                M["master_b"] = ((self.n_g,), self.dtype)
        for factor, end in self._blocks():
            M |= {name + end: shape for name, shape in self._shapes_of(factor).items()}
        return M

    @property
    def owned_bytes(self) -> int:
        """Of what the owner alone keeps, if ranks share the work."""
        shapes: Shapes = {"M": ((self.n_g, self.n_a), self.dtype)}
        for factor, end in self._blocks():
            own = {n: x for n, x in factor.kept_shapes(self.dtype).items() if n not in EVERYWHERE}
            shapes |= {name + end: x for name, x in own.items()}
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())

    def scratch_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every scratch tensor, but for the product scratch that all layers share."""
        n_a, n_g, groups = self.n_a, self.n_g, self.groups
        most = max(len(self.activations), len(self.gradients))
        work = workspace_size(n_a, n_g // groups) + (most - 1) * workspace_size(0, 0)
        shapes: dict[str, tuple[int, ...]] = {"work": (groups * work,)} if self.mine else {}
        if self.mine or self.shard is None:
            shapes["P"] = n_g, n_a
        if self.mine and self._settings.nesterov:
            shapes["ahead"] = (n_g, n_a)  # what M would be after the same gradient once more
        if self.shard is not None:
            shapes |= {"saved": (self.rows, n_a), "norms": (groups,)}
            if self.mine:  # the gradients of all rows
                shapes |= {"dW": (n_g, self.d_in), "db": (n_g * (n_a - self.d_in),)}
        shapes |= dict.fromkeys(("a_bar", "a_bar_next"), (groups * n_a,))
        shapes["slope"] = (self.rows,)
        return shapes | dict.fromkeys(self.gradients[0].vectors, (n_g,))

    def allocate(self) -> None:
        """Make the tensors, on the weight's device; the ones that exist stay."""
        device = self.weight.device
        if not self.kept:
            for name, (shape, dtype) in self.kept_shapes().items():
                self.kept[name] = torch.zeros(shape, dtype=dtype, device=device)
            for factor, end in self._blocks():
                factor.kept = {name: self.kept[name + end] for name in self._shapes_of(factor)}
                factor.clear()
        if not self.scratch:
            for name, shape in self.scratch_shapes().items():
                self.scratch[name] = torch.zeros(shape, dtype=self.dtype, device=device)
            if self.shard is None:
                self.scratch["saved"] = self.scratch["P"]  # descend_ leaves [W, b] of before there
            here = slice(None) if self.shard is None else self.shard.here
            self.scratch["h_change_here"] = self.scratch["h_change"][here]
            for name in ("a_bar", "a_bar_next"):
                self.scratch[name].view(-1, self.n_a)[:, self.d_in :] = 1.0  # of the ones the mean
            self._no_bias = torch.empty(0, dtype=self.weight.dtype, device=device)
            self._share_scratch()

    def _share_scratch(self) -> None:
        """Give every factor its rows of the vectors, and work of its own."""
        for side in (self.activations, self.gradients):
            begin = 0
            for factor in side:
                size = workspace_size(factor.n, 0)
                factor.scratch = {name: factor.of(self.scratch[name]) for name in factor.vectors}
                if self.mine:
                    work = self.scratch["work"].view(*factor.stack, -1)
                    # Where a side is one block, one call is for both.
                    factor.scratch["work"] = work if self.whole else work[..., begin : begin + size]
                    begin += size

    def reset(self) -> None:
        """Back to before the start; what is counted stays."""
        if self.mine:
            self.kept["M"].zero_()
        for factor, _ in self._blocks():
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
        """The weight, n_g x d_in, or those rows that are here, or its 32-bit copy; where it lies
        otherwise in memory a copy, for `put_back`."""
        W = self.here.place(local(self.weight))
        self._aside = not W.is_contiguous()
        master = self.kept.get("master_W")
        if master is not None:
            return master
        W = self.view.flat(W)
        if not self._aside:
            return W
        if "W" not in self.scratch or self.scratch["W"].dtype != W.dtype:
            self.scratch["W"] = torch.empty_like(W, memory_format=torch.contiguous_format)
        return self.scratch["W"].copy_(W)

    def put_back(self) -> None:
        """After an op has written `W`: let the weight have it."""
        if self._aside:
            master = self.kept.get("master_W")
            W = self.scratch["W"] if master is None else master.to(self.weight.dtype)
            self.here.write(local(self.weight), W)

    def b(self) -> torch.Tensor:
        """The bias, or its 32-bit copy, or an empty tensor."""
        master = self.kept.get("master_b")
        if master is not None:
            return master
        return self._no_bias if self.bias is None else self.here.vector(local(self.bias))

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The 16-bit parameters, each with its 32-bit copy; none where there are no copies."""
        if not self.has("master_W"):
            return []
        found = [(self.view.matrix(self.weight.detach()), self.kept["master_W"])]
        if self.bias is not None:
            found.append((self.view.vector(self.bias.detach()), self.kept["master_b"]))
        return found

    def dW(self, decay: float = 0.0) -> torch.Tensor:
        """The weight's gradient plus ``decay*W``, n_g x d_in; zero where it is frozen."""
        return self._gradient(self.weight, self.here.matrix, "no_dW", decay).contiguous()

    def db(self, decay: float = 0.0) -> torch.Tensor:
        """The bias's gradient, as the weight's; or an empty tensor."""
        if self.bias is None:
            return self._no_bias
        return self._gradient(self.bias, self.here.vector, "no_db", decay)

    def _gradient(self, p: nn.Parameter, own: Transform, zero: str, decay: float) -> torch.Tensor:
        if any(p is moved for moved in self.moving):
            assert p.grad is not None
            gradient = own(local(p.grad))
            return gradient.add(own(local(p)), alpha=decay) if decay else gradient
        if zero not in self.scratch or self.scratch[zero].dtype != p.dtype:
            self.scratch[zero] = torch.zeros_like(own(local(p)))
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
    def has_shown_inputs(self) -> bool:
        """Whether the inputs are at hand, if the step is one with factors."""
        return self.bare or self.observer.has_inputs()

    def inputs(self) -> list[Inputs]:
        """What the observer has kept, by the blocks of the activation side."""
        inputs = self.observer.inputs()
        if len(self.activations) == 1:
            return [inputs]
        return [inputs.columns(columns) for columns in self.columns()]

    def columns(self) -> list[slice]:
        """The inputs of each block of the activation side, without the bias."""
        ends = [(a.rows.start, min(a.rows.stop, self.d_in)) for a in self.activations]
        return [slice(*block) for block in ends]

    @property
    def halved(self) -> bool:
        """Whether this step moves the weight or the bias alone: the other is frozen."""
        return len(self.moving) <= (self.bias is not None)

    def hold(self) -> None:
        """Put the frozen half of before the step into what the ops have written, bit for bit;
        `put_back` follows."""
        moving = {id(p) for p in self.moving}
        saved = self.scratch["saved"]
        if id(self.weight) not in moving:
            W = self.scratch["W"] if self._aside and not self.has("master_W") else self.W()
            W.copy_(saved[:, : self.d_in])
        if self.bias is not None and id(self.bias) not in moving:
            self.b().copy_(saved[:, self.d_in])
