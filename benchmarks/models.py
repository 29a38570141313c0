"""The three autoencoders of the paper and their losses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from kbfgs_ext.bench.cases import ENCODERS, mirrored

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, pixels: Tensor) -> Tensor:
    """Binary cross-entropy in nats, summed over the pixels, mean over the batch (both (m, d))."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


def half_squared_error(outputs: Tensor, pixels: Tensor) -> Tensor:
    """Half the squared error, summed over the pixels, mean over the batch (both (m, d))."""
    return F.mse_loss(outputs, pixels, reduction="sum") / (2 * len(pixels))


@dataclass(frozen=True)
class Autoencoder:
    """Widths from the pixels to the code and back, and the loss of its outputs."""

    encoder: tuple[int, ...]  # pixels, ..., code
    loss: Loss

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths from the pixels to the code and back to the pixels."""
        return mirrored(self.encoder)

    def build(self) -> nn.Sequential:
        """Linear layers with PyTorch's default init, ReLU between them, none after code or output.

        Draws from the global generator: seed it first.
        """
        code = len(self.encoder) - 2
        layers: list[nn.Module] = []
        for i, (d_in, d_out) in enumerate(itertools.pairwise(self.widths)):
            layers.append(nn.Linear(d_in, d_out))
            if i != code and i != len(self.widths) - 2:
                layers.append(nn.ReLU())
        return nn.Sequential(*layers)


AUTOENCODERS = {
    "mnist": Autoencoder(ENCODERS["mnist"], cross_entropy),
    "curves": Autoencoder(ENCODERS["curves"], cross_entropy),
    "faces": Autoencoder(ENCODERS["faces"], half_squared_error),
}
