"""A training run on several processes, as torchrun starts them:

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.train

Every rank takes its part of each batch, and rank 0 prints and writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ALONE = ("kfac",)  # their factors follow one rank's part of the batch


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Context: one of torchrun's processes; does nothing in any other."""
    if "RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        dist.barrier()  # a process that ends while its group's threads are at work may be aborted
    finally:
        dist.destroy_process_group()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def leads() -> bool:
    """Whether this process is the one that prints and writes."""
    return size() == 1 or dist.get_rank() == 0


def check(optimizer: str, batch_size: int, max_seconds: float | None) -> None:
    """Raise ValueError where a run cannot be shared."""
    if size() == 1:
        return
    if optimizer in ALONE:
        raise ValueError(f"{optimizer} runs in one process")
    if batch_size % size():
        raise ValueError(f"batch_size {batch_size} is not a multiple of {size()} processes")
    if max_seconds is not None:
        raise ValueError("max_seconds: several processes would not end in the same step")


def wrapped(model: nn.Module) -> nn.Module:
    """``model`` as all ranks train it."""
    return model if size() == 1 else DistributedDataParallel(model)


def part(images: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return images if size() == 1 else images.chunk(size())[dist.get_rank()]
