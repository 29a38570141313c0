"""Long runs at a setting that no one should use: nothing breaks, and training recovers."""

import json
import math

import pytest
import torch

from benchmarks import endurance
from benchmarks.data import Dataset
from benchmarks.models import AUTOENCODERS, Autoencoder, cross_entropy
from kbfgs_ext import KBFGS, KBFGSL
from tests.optim.models import METHODS

# The default every time, the other in make test-all.
ACTIONS = pytest.mark.parametrize(
    "action", [pytest.param("ema", marks=pytest.mark.long), "minibatch"]
)


@pytest.mark.slow
@METHODS
@ACTIONS
def test_wild_setting(method, action):
    """lr 3, damping 1e-6, then inputs of a thousand and more, a NaN in 1% of the batches; after
    that the defaults. What is left of the network learns again."""
    pixels = pytest.importorskip("sklearn.datasets").load_digits().data / 16
    pixels = torch.from_numpy(pixels).float()
    torch.manual_seed(0)
    model = Autoencoder((64, 48, 24, 8), cross_entropy).build()
    untrained = pixels.shape[1] * math.log(2)
    done = endurance.endure(
        model,
        method(model, hessian_action=action, **endurance.WILD),
        lambda random: pixels[torch.randint(len(pixels), (100,), generator=random)],
        cross_entropy,
        wild_steps := 600,
        sane_steps := 400,
    )
    assert done.broken == 0
    poisoned = sum(not math.isfinite(loss) for loss in done.losses)
    assert 0 < poisoned <= done.counters["skipped"]
    for counts in done.diagnostics.values():
        assert counts["accepted_a"] > 0 and counts["accepted"] > 0
    assert done.counters["restarts"] >= 1
    assert done.mean_loss(wild_steps + sane_steps - 50, wild_steps + sane_steps) < untrained
    assert sum(done.restarted[-50:]) / 50 < untrained


def test_the_script_writes_a_row(tmp_path, monkeypatch):
    images = torch.rand(20, 784)
    monkeypatch.setitem(AUTOENCODERS, "mnist", Autoencoder((784, 20, 5), cross_entropy))
    monkeypatch.setattr(
        endurance,
        "embedded_digits",
        lambda: Dataset.of("mnist", "noise (20)", "a test", images[:15], images[15:]),
    )
    out = tmp_path / "rows.jsonl"
    line = f"--steps 4 --sane-steps 2 --optimizer kbfgs kbfgsl --json {out}"
    assert endurance.main(line.split()) == 0
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["optimizer"] for row in rows] == [KBFGS.__name__.lower(), KBFGSL.__name__.lower()]
    assert all(row["kind"] == "endurance" and row["broken_steps"] == 0 for row in rows)
    assert rows[0]["counters"]["steps"] == 6
