"""Counting the bytes of live tensor storages on the CPU, without trusting an allocator."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageMeter(TorchDispatchMode):
    """Within it, ``live`` is the bytes of storages made since and still alive; ``peak`` their
    maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage(), size=0)  # made before, unless it is counted
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and not value.is_meta:  # which has no bytes
                storage = value.untyped_storage()
                self._count(storage, storage.nbytes())
        return out

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata  # an address: free for another when the storage is gone
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
