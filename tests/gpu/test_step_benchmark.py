"""The whole-step benchmark on a GPU: every backend, eager and captured."""

from __future__ import annotations

import pytest
import torch

from benchmarks.data import Dataset
from benchmarks.models import AUTOENCODERS, Autoencoder, cross_entropy
from benchmarks.step import measure
from benchmarks.step.providers import GRAPH, chosen, providers
from benchmarks.training import Config, train
from tests.helpers.steps import CUDA, MLP

pytestmark = pytest.mark.gpu


def test_everyone_is_measured_and_a_graph_is_launched_at_once(monkeypatch):
    monkeypatch.setattr(measure, "MODELS", {"mlp": MLP})
    able, left_out = chosen(providers(CUDA), (), MLP, CUDA)
    assert set(left_out) <= {"SOAP"}  # heavyball may be missing, a backend may not
    rows = {row["provider"]: row for row in measure.measure("mlp", able, CUDA)}
    assert list(rows) == [provider.name for provider in able]
    for name, row in rows.items():
        assert row["loss"] is not None and row["ms"]["q50"] > 0
        counts, captured = row["counts"], name.endswith(GRAPH)
        assert (row["phases_ms"] is None) == captured
        if captured:
            plain = rows[name.removesuffix(GRAPH)]["counts"]
            assert 0 < counts["launches"] < plain["launches"]
            assert counts["allocations"] == 0
        else:
            assert min(counts.values()) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["kbfgs", "kbfgsl", "adamw"])
def test_a_captured_run_is_the_ordinary_one(monkeypatch, name, precision):
    monkeypatch.setitem(AUTOENCODERS, "mnist", Autoencoder((784, 20, 15, 10, 5), cross_entropy))
    pixels = torch.rand(200, 784, generator=torch.Generator().manual_seed(0))
    images = Dataset.of("mnist", "noise", "a test", pixels[:160], pixels[160:])
    losses = []
    for captured in (False, True):
        config = Config(
            optimizer=name, epochs=4, batch_size=16, schedule="cosine", device="cuda",
            precision=precision, captured=captured,
        )  # fmt: skip
        losses.append([row.train_loss for row in train(config, images).rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0]
