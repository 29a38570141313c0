"""Sharded parameters: the rows of a layer that `fully_shard` has left on each rank.

FSDP2 cuts a parameter along one dimension as `torch.chunk` does, and a rank has one piece, perhaps
an empty one. A layer is covered if its pieces are some of its outputs, rows of W, and the bias is
cut at the same places.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from kbfgs_ext.optim.layers import View


def local(t: torch.Tensor) -> torch.Tensor:
    """What this rank has of ``t``, without a graph; of a tensor that is not sharded, all."""
    if is_sharded(t):
        with torch.no_grad():
            t = t.to_local()  # type: ignore[attr-defined]
    return t.detach() if t.requires_grad else t


def is_sharded(t: torch.Tensor) -> bool:
    """Whether ``t`` is a `DTensor`."""
    return hasattr(t, "to_local")


def version(t: torch.Tensor) -> int:
    """Changes with every write to ``t`` or to the part of it that is here."""
    return t._version + (local(t)._version if is_sharded(t) else 0)


def type_of(module: nn.Module) -> type[nn.Module]:
    """The type of ``module`` before `fully_shard` has made it one of its own."""
    bases = type(module).__mro__
    made = len(bases) > 2 and bases[1].__name__ == "FSDPModule"
    return bases[2] if made else bases[0]


def pieces(n: int, ranks: int) -> list[slice]:
    """Where `torch.chunk` cuts ``n`` rows for so many ranks."""
    most = -(-n // ranks)
    ends = [min(i * most, n) for i in range(ranks + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


@dataclasses.dataclass(frozen=True)
class Shard:
    """What this rank has of a layer.

    Args:
        view: of the pieces of weight and bias that are here.
        rows: of the layer's n_g, by the rank.
        rank: this one.
    """

    view: View
    rows: list[slice]
    rank: int

    @property
    def here(self) -> slice:
        """This rank's rows."""
        return self.rows[self.rank]

    @property
    def length(self) -> int:
        """How many they are."""
        return self.here.stop - self.here.start

    @staticmethod
    def of(name: str, view: View, bias: torch.Tensor | None) -> Shard | None:
        """Of the layer of this name; None where its weight is no shard.

        Raises:
            NotImplementedError: the pieces are not rows, or the bias is cut elsewhere.
        """
        weight = view.weight
        if not is_sharded(weight):
            return None
        mesh = weight.device_mesh
        dim, ranks = weight.placements[-1].dim, mesh.size(mesh.ndim - 1)
        # Where the dimension that is cut is found when outputs come first.
        shape = [1 + (i == dim) for i in range(weight.dim())]
        marked = view.outputs_first(torch.empty(shape, device="cpu"))
        if marked.shape[0] != 2:
            raise NotImplementedError(
                f"layer '{name}' is sharded by its inputs, and ranks must have whole rows:"
                " fully_shard(..., shard_placement_fn=...) cuts it along another dimension, and"
                " exclude= gives it to the fallback"
            )
        theirs = _rows(view.outputs_first, weight, ranks, view.rows)
        rank = mesh.get_local_rank(mesh.ndim - 1)
        inside = dataclasses.replace(view, rows=_inside(view.rows, theirs[rank][1]))
        if bias is not None:
            beside = _rows(lambda t: t, bias, ranks, view.bias_rows or view.rows)
            if [rows for rows, _ in beside] != [rows for rows, _ in theirs]:
                raise NotImplementedError(
                    f"weight and bias of layer '{name}' are cut at different rows:"
                    " exclude= gives it to the fallback"
                )
            inside = dataclasses.replace(
                inside, bias_rows=_inside(view.bias_rows or view.rows, beside[rank][1])
            )
        return Shard(inside, [rows for rows, _ in theirs], rank)


def _inside(rows: slice | None, piece: slice) -> slice | None:
    return None if rows is None else piece


def _rows(
    outputs_first: Any, t: torch.Tensor, ranks: int, rows: slice | None
) -> list[tuple[slice, slice]]:
    """Of each rank's piece of ``t``, the part in ``rows``: counted from the first of these, and
    from the first of the piece."""
    n = outputs_first(torch.empty(t.shape, device="meta")).shape[0]
    rows, found = rows or slice(0, n), []
    for piece in pieces(n, ranks):
        a, b = max(piece.start, rows.start), min(piece.stop, rows.stop)
        among, there = (slice(a - at.start, max(b, a) - at.start) for at in (rows, piece))
        found.append((among, there) if a < b else (slice(0, 0), slice(0, 0)))
    return found


def mesh_of(model: nn.Module) -> Any:
    """The mesh over which `fully_shard` has sharded the ``model``; None if it has not.

    Raises:
        NotImplementedError: it is sharded in another way, or in part.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules = list(model.named_modules())
    for name, module in modules:
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise NotImplementedError(_REFUSED.format("FullyShardedDataParallel (FSDP1)", name))
    by_fsdp = fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for _, m in modules)
    named = dict(model.named_parameters())
    sharded = [name for name, p in named.items() if is_sharded(p)]
    if not sharded:
        return None
    if not by_fsdp:
        raise NotImplementedError(_REFUSED.format("DTensor (tensor parallelism)", sharded[0]))
    mesh = named[sharded[0]].device_mesh  # type: ignore[attr-defined]
    by_module = {id(p) for module in shards_of(model) for p in module.parameters()}
    for name, p in named.items():
        if is_sharded(p) and id(p) not in by_module:
            raise NotImplementedError(_REFUSED.format("DTensor (tensor parallelism)", name))
        if not is_sharded(p):
            raise NotImplementedError(
                f"parameter '{name}' of the model is not sharded, and others are: call fully_shard"
                " on the root module too, without ignored_params"
            )
        *others, last = p.placements  # type: ignore[attr-defined]
        if not last.is_shard() or not all(one.is_replicate() for one in others):
            raise NotImplementedError(
                f"parameter '{name}' of the model is {p.placements}: K-BFGS takes what"  # type: ignore[attr-defined]
                " fully_shard makes of a plain parameter, and no tensor parallelism beside it"
            )
        if p.device_mesh != mesh:  # type: ignore[attr-defined]
            raise NotImplementedError(
                f"parameter '{name}' of the model is on another mesh than '{sharded[0]}'"
            )
        if local(p).device.type != mesh.device_type:
            raise NotImplementedError(
                f"parameter '{name}' of the model is kept on {local(p).device.type} and computed"
                f" with on {mesh.device_type}: K-BFGS does not take fully_shard's CPUOffloadPolicy"
            )
        if p.dtype.itemsize < 4:
            raise NotImplementedError(
                f"parameter '{name}' of the model is sharded and {p.dtype}: keep it in float32 and"
                " give fully_shard a MixedPrecisionPolicy"
            )
    if mesh.ndim > 1 and mesh.size() < torch.distributed.get_world_size():
        raise NotImplementedError(f"{mesh} has two dimensions, and not all processes are in it")
    return mesh


def shards_of(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if fsdp is not None and isinstance(m, fsdp.FSDPModule)]


_REFUSED = (
    "{} at '{}' of the model: K-BFGS takes torch.distributed.fsdp.fully_shard (FSDP2) and"
    " torch.nn.parallel.DistributedDataParallel"
)
