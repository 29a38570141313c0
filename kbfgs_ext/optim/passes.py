"""The second pass must see the first one's world: same random numbers, same buffers, other weights.

`SecondPass` is a context manager around the second run of the closure. Inside it the random
generators stand where they stood before the first pass, and parameters want no gradient. On
leaving, buffers (BatchNorm statistics) are as the first pass left them, and every parameter has its
requires_grad and its first-pass gradient again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


class RandomState:
    """The state of the random generators that a pass may draw from: CPU, and a CUDA device's.

    A capture has no state to read: graph.py sees to it that nothing is drawn in one.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        readable = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        self._cuda = torch.cuda.get_rng_state(device) if readable else None
        self._device = device

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Buffers:
    """Copies of a model's buffers, kept from step to step.

    All of them: BatchNorm's kernels write the running statistics without a trace in the tensor's
    version, so which buffers a pass has changed cannot be told beforehand.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._saved: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]] = []

    def save(self) -> None:
        """Copy every buffer."""
        kept = {id(buffer): copy for _, _, buffer, copy in self._saved}
        self._saved = []
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                copy = kept.get(id(buffer))
                if copy is None or copy.shape != buffer.shape or copy.dtype != buffer.dtype:
                    copy = buffer.clone()
                else:
                    copy.copy_(buffer)
                self._saved.append((module, name, buffer, copy))

    def copies(self) -> list[torch.Tensor]:
        """The copies as they stand."""
        return [copy for *_, copy in self._saved]

    def restore(self) -> None:
        """Put every buffer back as `save` found it, replaced ones too."""
        for module, name, buffer, copy in self._saved:
            buffer.copy_(copy)
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
        self._buffers.save()
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
        self._buffers.restore()


@contextlib.contextmanager
def own_work(device: torch.device, matmul_precision: str | None) -> Iterator[None]:
    """Context of the optimizer's own work: no graph, no autocast, its own precision of products.

    Autocast keeps 16-bit copies of the weights while it is on; they are void afterwards.
    """
    before = torch.get_float32_matmul_precision() if matmul_precision else ""
    try:
        if matmul_precision:
            torch.set_float32_matmul_precision(matmul_precision)
        with torch.no_grad(), _no_autocast(device):
            yield
    finally:
        if matmul_precision:
            torch.set_float32_matmul_precision(before)
        torch.clear_autocast_cache()


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
