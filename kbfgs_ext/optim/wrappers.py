"""What torch wraps around a model that several processes train, and the process that follows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext.optim.distributed import Ranks
from kbfgs_ext.optim.process import Alone

MEANS = ("ranks", "rows")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel`, compiled or not; any other as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, DDP) else model


def wrappers_of(*models: nn.Module) -> list[DDP]:
    """Every `DistributedDataParallel` in the ``models``."""
    found = {id(m): m for model in models for m in model.modules() if isinstance(m, DDP)}
    return list(found.values())


def refuse_shards(model: nn.Module) -> None:
    """Raise NotImplementedError where a rank holds but a part of the model's parameters."""
    fsdp, tensor = (
        sys.modules.get("torch.distributed.fsdp"),
        sys.modules.get("torch.distributed.tensor"),
    )
    for name, module in model.named_modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise NotImplementedError(_REFUSED.format("FullyShardedDataParallel (FSDP1)", name))
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            raise NotImplementedError(_REFUSED.format("fully_shard (FSDP2)", name))
    for name, p in model.named_parameters():
        if tensor is not None and isinstance(p, tensor.DTensor):
            raise NotImplementedError(_REFUSED.format("DTensor (tensor parallelism)", name))


_REFUSED = (
    "{} at '{}' of the model: K-BFGS needs every layer's whole weight on every rank. Wrap the model"
    " in torch.nn.parallel.DistributedDataParallel instead"
)


def process_of(group: Any, wrappers: Sequence[DDP], mean_over: str, device: torch.device) -> Alone:
    """The process as one of ``group``, or of the group of ``wrappers``; `Alone` in a group of one.

    Raises:
        TypeError, ValueError: the arguments do not fit each other.
    """
    if mean_over not in MEANS:
        raise ValueError(f"mean_over must be one of {MEANS}, got {mean_over!r}")
    if wrappers and mean_over == "rows":
        raise ValueError(
            'mean_over="rows" with DistributedDataParallel, which has averaged over the ranks by'
            " then: scale the loss in the closure, or give the bare model and process_group="
        )
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {group!r}")
    groups = ([] if group is None else [group]) + [wrapper.process_group for wrapper in wrappers]
    if len({dist.get_world_size(one) for one in groups}) > 1:
        raise ValueError("process_group and the groups of DistributedDataParallel are not the same")
    if not groups or dist.get_world_size(groups[0]) == 1:
        return Alone(wrappers)
    if dist.get_rank(groups[0]) < 0:
        raise ValueError("process_group: this process is not in the group")
    return Ranks(groups[0], wrappers, mean_over, device)
