"""What torch wraps around a model that several processes train, and the process that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.distributed import Ranks
from kbfgs_ext.optim.owners import Owners, Shards
from kbfgs_ext.optim.process import Alone
from kbfgs_ext.optim.rules import RankRule, check_rule
from kbfgs_ext.optim.shards import mesh_of, shards_of
from kbfgs_ext.optim.sharing import Shares


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel`, compiled or not; any other as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, DDP) else model


def wrappers_of(*models: nn.Module) -> list[DDP]:
    """Every `DistributedDataParallel` in the ``models``."""
    found = {id(m): m for model in models for m in model.modules() if isinstance(m, DDP)}
    return list(found.values())


def process_of(
    group: Any,
    wrappers: Sequence[DDP],
    rule: RankRule,
    device: torch.device,
    model: nn.Module | None = None,
    layers: Sequence[CoveredLayer] = (),
) -> Alone:
    """The process as one of ``group``, or of the group of ``wrappers``, or of the mesh over which
    the ``model`` is sharded; `Alone` in a group of one. With ``shared_work="auto"`` the ``layers``
    decide.

    Raises:
        TypeError, ValueError: the arguments do not fit each other.
    """
    check_rule("ranks", rule, RankRule)
    mean_over, shared_work = rule.mean_over, rule.shared_work
    if wrappers and mean_over == "rows":
        raise ValueError(
            'mean_over="rows" with DistributedDataParallel, which has averaged over the ranks by'
            " then: scale the loss in the closure, or give the bare model and process_group="
        )
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {group!r}")
    groups = ([] if group is None else [group]) + [wrapper.process_group for wrapper in wrappers]
    mesh = None if model is None else mesh_of(model)
    if mesh is not None:
        return _sharded(mesh, model, groups, mean_over, device)
    if len({dist.get_world_size(one) for one in groups}) > 1:
        raise ValueError("process_group and the groups of DistributedDataParallel are not the same")
    if not groups or dist.get_world_size(groups[0]) == 1:
        return Alone(wrappers)
    if dist.get_rank(groups[0]) < 0:
        raise ValueError("process_group: this process is not in the group")
    if shared_work == "auto":
        shared_work = Shares.of(layers, dist.get_world_size(groups[0])).pays
    kind = Owners if shared_work else Ranks
    return kind(groups[0], wrappers, mean_over, device)


def _sharded(mesh: Any, model: Any, groups: list[Any], mean_over: str, device: Any) -> Shards:
    if mean_over == "rows":
        raise ValueError(
            'mean_over="rows" with fully_shard, which averages gradients over the ranks: scale the'
            " loss in the closure"
        )
    if any(dist.get_world_size(group) != mesh.size() for group in groups):
        raise ValueError("process_group and the mesh of fully_shard are not the same")
    return Shards(shards_of(model), mesh, mean_over, device)
