"""Copies of many tensors, in a number of kernels that does not grow with them.

torch._foreach_* take a list in few launches where all of it has one dtype and one device; so
tensors are sorted by these, and the copies of a kind lie in one piece of memory. A choice between
two values is made on integers of the same size: sums and products of them are exact, so that NaN,
infinities and -0 go through as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

ALIGNED = 64  # elements; kernels load several at a time
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Tensors = list[torch.Tensor]


class Copies:
    """Copies of a list of tensors, kept in their places from one `keep` to the next."""

    def __init__(self) -> None:
        self._like: list[tuple] = []
        self._kinds: list[_Kind] = []

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy ``tensors``, which later calls are about."""
        like = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
        if like != self._like:
            kinds: dict[tuple, list[int]] = {}
            for i, (_, _, dtype, device) in enumerate(like):
                kinds.setdefault((dtype, device), []).append(i)
            self._kinds = [_Kind(tensors, places) for places in kinds.values()]
            self._like = like
        for kind in self._kinds:
            kind.tensors = [tensors[i] for i in kind.places]
            torch._foreach_copy_(kind.copies, kind.tensors)

    def put_back(self, where: torch.Tensor | None = None) -> None:
        """Put the tensors back where ``where``, bit for bit; without it, wherever.

        A flag on a device does not reach tensors on the host without a read: those stay.
        """
        for kind in self._kinds:
            if where is None:
                torch._foreach_copy_(kind.tensors, kind.copies)
            elif kind.device == where.device or kind.device.type != "cpu":
                now, before = integers(kind.tensors), integers(kind.copies)
                keep = (~where).to(kind.device, now[0].dtype)
                torch._foreach_sub_(now, before)
                torch._foreach_mul_(now, keep)
                torch._foreach_add_(now, before)

    def slope(self, gradients: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
        """The sum of gradient times change since `keep`, a scalar as ``like``: one of 16-bit
        tensors too is a sum in its dtype."""
        parts = [
            part.to(like.device)
            for kind in self._kinds
            for part in kind.slopes([gradients[i] for i in kind.places], like.dtype)
        ]
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(like)

    def tensors(self) -> Tensors:
        """All that is kept here."""
        return [t for kind in self._kinds for t in (kind.whole, kind.moved) if t is not None]


class _Kind:
    """Those of one dtype and device: their places in the list, and their copies."""

    def __init__(self, tensors: Sequence[torch.Tensor], places: list[int]) -> None:
        self.places = places
        self.tensors = [tensors[i] for i in places]
        self.device = self.tensors[0].device
        self.whole = _room(self.tensors)
        self.copies = _views(self.whole, self.tensors)
        self.moved: torch.Tensor | None = None  # made when a slope is asked for

    def slopes(self, gradients: Sequence[torch.Tensor | None], dtype: torch.dtype) -> Tensors:
        """Scalars whose sum is that of gradient times change: of sparse gradients one each."""
        if self.moved is None:
            self.moved = torch.zeros_like(self.whole)
        moved = _views(self.moved, self.tensors)
        torch._foreach_copy_(moved, self.tensors)
        self.moved.sub_(self.whole)
        found, dense = [], []
        for change, gradient in zip(moved, gradients, strict=True):
            if gradient is not None and not gradient.is_sparse:
                dense.append((change, gradient))
                continue
            if gradient is not None:
                found.append((gradient * change).sum(dtype=dtype))
            change.zero_()
        if dense:
            torch._foreach_mul_([change for change, _ in dense], [g for _, g in dense])
        return [self.moved.sum(dtype=dtype), *found]


def _room(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].new_zeros(sum(map(_length, tensors)))


def _views(whole: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Tensors:
    """Parts of ``whole``, as ``tensors`` are in shape and in the order of their elements."""
    views, at = [], 0
    for t in tensors:
        stride = torch.empty_like(t, device="meta").stride()
        views.append(whole.as_strided(t.shape, stride, at))
        at += _length(t)
    return views


def _length(t: torch.Tensor) -> int:
    return -(-t.numel() // ALIGNED) * ALIGNED


def integers(tensors: Iterable[torch.Tensor]) -> Tensors:
    """The same memory, as integers of the same size."""
    real = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
    return [t.view(INTEGERS[t.element_size()]) for t in real]


def zero_unless(ok: torch.Tensor, tensors: Iterable[torch.Tensor]) -> None:
    """Set the tensors to 0 unless ``ok``, NaN too."""
    kinds: dict[tuple, Tensors] = {}
    for t in integers(tensors):
        kinds.setdefault((t.dtype, t.device), []).append(t)
    for (dtype, device), alike in kinds.items():
        torch._foreach_mul_(alike, ok.to(device, dtype))
