"""The second pass must see the first one's world: same random numbers, same buffers, other weights.

`SecondPass` is a context manager around the second run of the closure. Inside it the random
generators stand where they stood before the first pass, and parameters want no gradient; on leaving,
buffers that the first pass has advanced (BatchNorm statistics) are as the first pass left them, and
every parameter has its requires_grad and its first-pass gradient again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class RandomState:
    """The state of the random generators that a pass may draw from: CPU, and a CUDA device's."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._device = device

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Buffers:
    """A model's buffers: which ones a pass has changed, and their values before the next pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = [(b, b._version) for _, _, b in self._all()]

    def _all(self) -> Iterable[tuple[nn.Module, str, torch.Tensor]]:
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield module, name, buffer

    def changed(self) -> list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]]:
        """Owner, name, tensor and copy of each buffer written or replaced since construction."""
        seen = {id(buffer): version for buffer, version in self._seen}
        return [
            (module, name, buffer, buffer.clone())
            for module, name, buffer in self._all()
            if seen.get(id(buffer)) != buffer._version
        ]

    def copies(self) -> list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]]:
        """The same of every buffer."""
        return [(module, name, buffer, buffer.clone()) for module, name, buffer in self._all()]

    @staticmethod
    def restore(saved: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]]) -> None:
        """Put what `changed` or `copies` returned back."""
        for module, name, buffer, value in saved:
            buffer.copy_(value)
            module._buffers[name] = buffer


class SecondPass:
    """Context of the second run of the closure; see the head of this file."""

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        random: RandomState,
        buffers: Buffers,
        freeze: bool,
    ) -> None:
        self._parameters = list(parameters)
        self._random = random
        self._buffers = buffers
        self._freeze = freeze

    def __enter__(self) -> None:
        self._saved = self._buffers.changed()
        self._gradients = [p.grad for p in self._parameters]
        self._wanted = [p.requires_grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
            if self._freeze:
                p.requires_grad_(False)
        self._random.restore()

    def __exit__(self, *exception: object) -> None:
        for p, gradient, wanted in zip(
            self._parameters, self._gradients, self._wanted, strict=True
        ):
            p.requires_grad_(wanted)
            p.grad = gradient
        self._buffers.restore(self._saved)
