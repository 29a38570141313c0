"""Whole models on real data: a character transformer and a BatchNorm network, against AdamW."""

import functools
import warnings
from pydoc_data import topics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kbfgs_ext import KBFGS, KBFGSL

STEPS, CONTEXT, BATCH, WIDTH = 100, 32, 16, 32
SEEDS = [0, 1, 2]
ADAMW_LRS = [3e-3, 1e-2, 3e-2]  # the best of these is the one to beat

# The default every time, the other in make test-all.
ACTIONS = pytest.mark.parametrize(
    "action", [pytest.param("ema", marks=pytest.mark.long), "minibatch"]
)
METHODS = pytest.mark.parametrize(
    ("method", "options"), [(KBFGS, {}), (KBFGSL, {"memory": 20})], ids=["kbfgs", "kbfgsl"]
)


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm; projections are nn.Linear."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, d))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A character model whose head shares the embedding's weight."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(WIDTH, 4), Block(WIDTH, 4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters, bias=False)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.05)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places.weight)))


@functools.cache
def text() -> tuple[torch.Tensor, int]:
    """Python's reference manual as character numbers, and how many characters there are."""
    whole = "".join(topics.topics[name] for name in sorted(topics.topics))
    number = {character: i for i, character in enumerate(sorted(set(whole)))}
    return torch.tensor([number[character] for character in whole]), len(number)


def text_batch(random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    data, _ = text()
    at = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=random) + torch.arange(CONTEXT)
    return data[at], data[at + 1]


def fallback(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


def train(model: nn.Module, opt: torch.optim.Optimizer, batches) -> float:
    """Mean training loss over the second half of the steps, with a falling learning rate."""
    losses, schedule = [], torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    for x, wanted in batches:

        def closure(x=x, wanted=wanted):
            opt.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, -2), wanted.flatten())
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
        schedule.step()
    return sum(losses[len(losses) // 2 :]) / (len(losses) - len(losses) // 2)


def train_transformer(seed: int, make) -> float:
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = Transformer(text()[1])
    return train(model, make(model), (text_batch(random) for _ in range(STEPS)))


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1797 handwritten digits of 8 x 8 pixels, and which they are."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.from_numpy(found.data / 16).float(), torch.from_numpy(found.target)


def digit_batch(random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x, wanted = digits()
    at = torch.randint(len(x), (128,), generator=random)
    return x[at], wanted[at]


def train_norm(seed: int, make) -> float:
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 48, bias=False),
        nn.BatchNorm1d(48),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Linear(48, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(inplace=True),
        nn.Linear(48, 10),
    )
    loss = train(model, make(model), (digit_batch(random) for _ in range(STEPS)))
    assert model[1].num_batches_tracked == STEPS  # once a step, not once a pass
    return loss


def mean_loss(run, make) -> float:
    """Of ``run`` over the seeds."""
    return sum(run(seed, make) for seed in SEEDS) / len(SEEDS)


@functools.cache
def adamw_loss(run) -> float:
    """The mean loss of AdamW in ``run``, with the learning rate that suits it best."""
    return min(
        mean_loss(run, lambda model, lr=lr: torch.optim.AdamW(model.parameters(), lr=lr))
        for lr in ADAMW_LRS
    )


@METHODS
@ACTIONS
@pytest.mark.parametrize("run", [train_transformer, train_norm], ids=["transformer", "batch norm"])
def test_a_lower_loss_than_adamw(run, method, options, action):
    """After as many steps, at one setting for both models, and without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = mean_loss(
            run,
            lambda model: method(model, hessian_action=action, fallback=fallback, **options),
        )
    assert loss < adamw_loss(run)


@METHODS
def test_the_only_warning_is_ours(method, options):
    """With the default fallback: one warning, which names the parameters that it takes."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        model = Transformer(text()[1])
        opt = method(model, **options)
        train(model, opt, [text_batch(torch.Generator().manual_seed(0))] * 2)
    assert len(seen) == 1
    said = str(seen[0].message)
    assert "places.weight" in said and "norm1" in said and "tokens" not in said
    assert {layer.name for layer in opt.layers} >= {"head", "blocks.0.qkv"}
