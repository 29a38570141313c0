"""Moving the shared cases to the GPU and back."""

from __future__ import annotations

import torch

from tests.helpers import calls


def to_gpu(args: calls.Args) -> calls.Args:
    """The arguments on the GPU, with the strides that they have."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
        return out.copy_(tensor)

    return calls.apply(args, move)


def run(op: str, args: calls.Args, backend: str) -> calls.Args:
    """The op on copies of ``args`` on the GPU; returns them as it left them, on the CPU."""
    mine = to_gpu(args)
    calls.call(op, mine, backend)
    return calls.apply(mine, torch.Tensor.cpu)
