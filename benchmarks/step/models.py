"""The networks that whole steps are timed on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import AUTOENCODERS, Loss, half_squared_error


@dataclass(frozen=True)
class Model:
    """A network that is trained to give its inputs back."""

    title: str  # for people
    build: Callable[[], nn.Module]  # draws from the global generator: seed it first
    shape: tuple[int, ...]  # of one input
    loss: Loss
    batch_size: int = 1000
    rounds: int = 30
    at_once: int = 32  # providers in memory at a time, the eager reference among them
    senseless: Mapping[str, str] = field(default_factory=dict)  # provider: why it makes no sense
    long: Collection[str] = ()  # providers one period of whose steps takes minutes on a CPU

    def batch(self, size: int) -> Tensor:
        """Inputs (size, *shape) between 0 and 1, the same every time."""
        return torch.rand(size, *self.shape, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Self-attention and an MLP of 4 times the width, each behind a LayerNorm.

    As in `nn.TransformerEncoderLayer` with ``norm_first``, but for the projections of attention,
    which are `nn.Linear` layers here, so that they are covered.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, width), and as it comes out."""
        B, T, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, width))
        return x + self.mlp(self.norm2(x))


def blocks(count: int, width: int, heads: int) -> nn.Sequential:
    """A stack of transformer blocks, without embedding and head."""
    return nn.Sequential(*(Block(width, heads) for _ in range(count)))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mean_over_tokens(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Half the squared error of a token, mean over all tokens (both (B, T, width))."""
    return half_squared_error(outputs.flatten(0, 1), inputs.flatten(0, 1))


def _autoencoder(name: str, rounds: int) -> Model:
    task = AUTOENCODERS[name]
    title = f"{name.upper()} autoencoder"
    return Model(title, task.build, task.widths[:1], task.loss, rounds=rounds)


# Rounds are such that a model takes a few minutes on 2 CPU cores.
MODELS = {
    "mnist": _autoencoder("mnist", 30),
    "curves": _autoencoder("curves", 30),
    "faces": _autoencoder("faces", 10),
    "transformer": Model(
        "12 transformer blocks of width 768 on sequences of 128 tokens",
        lambda: blocks(12, 768, 12),
        (128, 768),
        mean_over_tokens,
        batch_size=4,  # 512 tokens
        rounds=3,
        at_once=4,  # of 2 to 3.5 GB each
        senseless={"K-FAC": "it is written for models of linear layers alone"},
        long=("SOAP",),
    ),
    "mlp": Model(
        "MLP of 4 layers 4096-4096",
        lambda: mlp(*[4096] * 5),
        (4096,),
        half_squared_error,
        rounds=3,
        at_once=6,  # of 1 to 2 GB each
        senseless={"SOAP": "heavyball's leaves sides above 2048 as they are: it would be Adam"},
        long=("K-FAC",),
    ),
    "small": Model(  # all of it is what the host does
        "MLP of 10 layers 16-16",
        lambda: mlp(*[16] * 11),
        (16,),
        half_squared_error,
        batch_size=64,
        rounds=60,
        senseless={"SOAP": "its steps are no shorter for being small"},
    ),
}
