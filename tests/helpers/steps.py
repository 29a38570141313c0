"""Networks of a few neurons for the whole-step benchmark, and who steps on them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import half_squared_error
from benchmarks.step import models
from benchmarks.step.measure import Runner
from benchmarks.step.models import Model
from benchmarks.step.providers import Provider, providers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MLP = Model("MLP", lambda: models.mlp(12, 20, 16, 12), (12,), half_squared_error, 8, rounds=2)
STACK = Model(
    "transformer",
    lambda: models.blocks(2, 16, 4),
    (5, 16),
    models.mean_over_tokens,
    batch_size=3,
    rounds=2,
    senseless=models.MODELS["transformer"].senseless,
)
EVERYONE = providers(CPU)
BY_NAME = {provider.name: provider for provider in EVERYONE}


def runner(provider: Provider, model: Model = MLP) -> Runner:
    """The provider at work, past its warm-up."""
    if provider.missing:
        pytest.skip(provider.missing)
    return Runner(provider, model, model.batch(model.batch_size), lambda name: None)


class Ticking:
    """A clock that advances by one whenever it is read."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter(self) -> int:
        self.now += 1
        return self.now
