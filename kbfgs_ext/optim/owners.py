"""Several processes that share the work: every layer has an owner.

The owner alone keeps M and the factors of its layers, and makes P from the whole gradient; a step
equals that of ranks of which each does everything. What is sent beside the vectors of exchange.py:

                    gradient         s = H_a a_bar        P
    `Owners`        all have it      in a vector          broadcast by the owner
    `Shards`        to the owner     in a vector          its rows to the rank that has them

In `Shards` a rank has some rows of every [W, b], as `fully_shard` has cut them, and moves these.
Steps 2 to 4 are an all-to-all of the gradient's rows, the owners' work, and an all-to-all of P's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.direction import lengths_of
from kbfgs_ext.optim.distributed import Ranks
from kbfgs_ext.optim.exchange import ASK, CHANGE, SLOPE
from kbfgs_ext.optim.factors import Tensors
from kbfgs_ext.optim.parts import Part, of_mine
from kbfgs_ext.optim.shards import is_sharded, local
from kbfgs_ext.optim.sharing import cost, share_out

PIECE = 2**22  # elements: of each rank about as many P are made before they are sent


class Owners(Ranks):
    """The processes of ``group``, each with layers of its own."""

    shares = True

    def __init__(self, *arguments: Any, inner: Any = None) -> None:
        super().__init__(*arguments)
        self.twins = None
        # The ranks that share the work: all, or those of a replica, which do the same in each.
        self.inner = self.group if inner is None else inner
        self.place, self.places = dist.get_rank(self.inner), dist.get_world_size(self.inner)
        self.leads = self.place == self.rank  # in the replica that speaks for all
        self.loads = [0] * self.places  # FLOPs a step
        self._owner: dict[int, int] = {}  # by the layer
        self._sent: list[Any] = []  # P that are on their way
        self.piece = PIECE * self.places

    def take(self, layers: list[CoveredLayer]) -> None:
        super().take(layers)
        owners = share_out([cost(layer) for layer in layers], self.loads)
        for layer, owner in zip(layers, owners, strict=True):
            self._owner[id(layer)] = owner
            layer.mine = owner == self.place

    def explain(self) -> str:
        own = sum(owner == self.rank for owner in self._owner.values())
        share = self.loads[self.place] / max(sum(self.loads), 1)
        why = "" if self.sharded else f"\n{self._shares()}"
        rows = ", and has some rows of every weight" if self.sharded else ""
        return (
            f"work shared by {self.places} ranks: rank {self.rank} owns {own} of"
            f" {len(self._owner)} layers, {share:.0%} of the FLOPs{rows}{why}"
        )

    def _of(self, parts: list[Part], owner: int) -> list[CoveredLayer]:
        layers = [layer for part in parts for layer in part.layers]
        return [layer for layer in layers if self._owner[id(layer)] == owner]

    def _sum_average(self, layer: CoveredLayer, average: torch.Tensor) -> None:
        if layer.activations[0].settings.keep_A or self.places < self.size:
            super()._sum_average(layer, average)  # all have a share of A, or several own the layer
        else:
            dist.reduce(average, group_dst=self._owner[id(layer)], group=self.group)

    def hand_out(self, part: Part) -> None:
        """Begin to; meanwhile the direction of the next part is made."""
        self._sent += [
            dist.broadcast(layer["P"], group_src=owner, group=self.group, async_op=True)
            for owner in range(self.places)
            for layer in self._of([part], owner)
        ]

    def handed_out(self, parts: list[Part]) -> None:
        while self._sent:
            self._sent.pop(0).wait()
        super().handed_out(parts)

    def begin(self, layers: list[CoveredLayer], parameters: Tensors, number: int) -> None:
        self._sent.clear()
        super().begin(layers, parameters, number)

    def _along(self, parts: list[Part]) -> dict[int, torch.Tensor]:
        if not parts:
            return {}
        self.vector.zero_()
        for block, s in super()._along(of_mine(parts) if self.leads else []).items():
            self._y[block].copy_(s)
        self._repeat(ASK)
        factors = [f for part in parts for f in part.a.factors]
        return {id(f): self._y[id(f)].to(f["a_bar"].dtype, copy=True) for f in factors}

    def _repeat(self, kind: int) -> None:
        """An exchange without rows."""
        self._exchange(kind, [0] * len(self._layers), [False] * len(self._layers))


class Shards(Owners):
    """The processes of a mesh, over which ``modules`` are sharded by `fully_shard`; by its last
    dimension, and replicated by the other, if there is one."""

    sharded = True

    def __init__(self, modules: list[Any], mesh: Any, mean_over: str, device: Any) -> None:
        self._modules, inner = modules, mesh.get_group(mesh.ndim - 1)
        self._rooms: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        group = inner if mesh.ndim == 1 else dist.group.WORLD
        super().__init__(group, [], mean_over, device, inner=inner)
        self.piece = None
        self.twins = None if mesh.ndim == 1 else mesh.get_group(0)

    def _mark(self, layers: list[CoveredLayer]) -> None:
        parameters = [p for module in self._modules for p in module.parameters()]
        self._averaged = {id(p) for p in parameters if is_sharded(p)}
        for layer in layers:
            layer.observer.averaged = True

    def _look_at_gradients(self) -> None:
        found = {
            i: local(p.grad)
            for i, p in enumerate(self._parameters)
            if p.grad is not None and local(p.grad).numel()
        }
        if found and self.leads:
            places = [self._norms[i] for i in found]
            torch._foreach_copy_(places, torch._foreach_norm(list(found.values())))
            self._norms.square_()

    def gradient_norms(self, parameters: Tensors) -> torch.Tensor | None:
        places = {id(p): i for i, p in enumerate(self._parameters)}
        return self._norms[[places[id(p)] for p in parameters]].sqrt()

    def second(
        self, paired: list[CoveredLayer], loss: torch.Tensor, slope: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.vector[SLOPE] = slope if slope is not None and self.leads else 0.0
        loss, _ = super().second(paired, loss, slope)
        return loss, None if slope is None else self.vector[SLOPE].to(slope.dtype, copy=True)

    def collect(self, parts: list[Part]) -> None:
        decays = {id(x): part.group["weight_decay"] for part in parts for x in part.layers}
        send = [
            [t for x in self._of(parts, r) for t in (x.dW(decays[id(x)]), x.db(decays[id(x)]))]
            for r in range(self.places)
        ]
        mine = self._of(parts, self.place)
        self._swap(
            send,
            [
                [x[name][x.shard.rows[r]] for x in mine if x.shard for name in ("dW", "db")]
                for r in range(self.places)
            ],
        )

    def hand_out(self, part: Part) -> None:
        """All at once, in the end."""

    def handed_out(self, parts: list[Part]) -> None:
        mine = self._of(parts, self.place)
        each = [lengths_of(x.by_group(x["P"])) for x in mine]
        send = [
            [
                t
                for x, norms in zip(mine, each, strict=True)
                if x.shard
                for t in (norms, x["P"][x.shard.rows[r]])
            ]
            for r in range(self.places)
        ]
        receive = [
            [t for x in self._of(parts, r) for t in (x["norms"], x["saved"])]
            for r in range(self.places)
        ]
        self._swap(send, receive)
        super().handed_out(parts)

    def _swap(self, send: list[Tensors], receive: list[Tensors]) -> None:
        """All ranks give each other tensors, of which both know the shapes; by the dtype."""
        for dtype in dict.fromkeys(layer.dtype for layer in self._layers):
            out, into = (
                [[t for t in of_rank if t.dtype == dtype] for of_rank in side]
                for side in (send, receive)
            )
            sizes = [[sum(t.numel() for t in of_rank) for of_rank in side] for side in (out, into)]
            flat, got = (
                self._room(name, sum(n), dtype) for name, n in zip("<>", sizes, strict=True)
            )
            torch.cat([t.flatten() for of_rank in out for t in of_rank] or [flat], out=flat)
            dist.all_to_all_single(got, flat, sizes[1], sizes[0], group=self.inner)
            places = [t for of_rank in into for t in of_rank]
            for place, part in zip(places, got.split([t.numel() for t in places]), strict=True):
                place.copy_(part.view(place.shape))

    def _room(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Elements to send or receive, in memory that is kept from step to step."""
        room = self._rooms.get((name, dtype))
        if room is None or len(room) < size:
            room = torch.empty(size, dtype=dtype, device=self.device)
            self._rooms[name, dtype] = room
        return room[:size]

    def changed(self, parts: list[Part]) -> None:
        if not self.leads or self.place:
            self.vector.zero_()  # what it holds is known to all: one rank repeats it
        torch._foreach_zero_(self._g)
        places = {id(layer): g for layer, g in zip(self._layers, self._g, strict=True)}
        layers = [layer for part in parts for layer in part.layers]
        for layer in layers if self.leads else []:
            assert layer.shard is not None
            here = layer.shard.here
            places[id(layer)][here].copy_(layer["h_change"][here])
        self._repeat(CHANGE)
        for layer in layers:
            layer["h_change"].copy_(places[id(layer)])

    # ------------------------------------------------------------------ the passes

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Context of a second pass: its forward gathers the weights as they are now."""
        for module in self._modules:
            module.reshard()
        self._passed = False
        with super().quiet():
            yield
