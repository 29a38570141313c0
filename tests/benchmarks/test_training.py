"""Models, losses, optimizers and training runs on a handful of images."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import optimizers, records, training
from benchmarks.data import Dataset
from benchmarks.models import AUTOENCODERS, Autoencoder, cross_entropy, half_squared_error
from benchmarks.optimizers import Settings, SettingsError
from benchmarks.training import Config, Observer, train
from kbfgs_ext import DirectionRule, SafeguardRule, presets
from kbfgs_ext.bench.environment import environment

PAPERS = dict(AUTOENCODERS)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs train a narrow autoencoder of the same depth, which takes a fraction of a second."""
    monkeypatch.setitem(AUTOENCODERS, "mnist", Autoencoder((784, 20, 15, 10, 5), cross_entropy))


@pytest.fixture(scope="module")
def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(50, 784, generator=generator)
    return Dataset.of("mnist", "noise (50)", "a test", pixels[:35], pixels[35:])


def config(**changes: object) -> Config:
    """Two epochs of AdamW, two batches of 16 each; three images are dropped."""
    plain = {"optimizer": "adamw", "epochs": 2, "batch_size": 16}
    return Config(**(plain | changes))


# ------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("mnist", "784-1000-500-250-30-250-500-1000-784"),
        ("curves", "784-400-200-100-50-25-6-25-50-100-200-400-784"),
        ("faces", "625-2000-1000-500-30-500-1000-2000-625"),
    ],
)
def test_autoencoders_are_the_papers(name: str, widths: str) -> None:
    model = PAPERS[name].build()
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == [
        int(width) for width in widths.split("-")
    ]
    followed = [
        i + 1 < len(model) and isinstance(model[i + 1], nn.ReLU)
        for i, layer in enumerate(model)
        if isinstance(layer, nn.Linear)
    ]
    code = len(linear) // 2 - 1
    assert followed == [i not in (code, len(linear) - 1) for i in range(len(linear))]


def test_losses_by_hand() -> None:
    pixels = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    assert cross_entropy(torch.zeros(2, 2), pixels).item() == pytest.approx(2 * math.log(2))
    assert half_squared_error(pixels + 3, pixels).item() == pytest.approx(9)


# ------------------------------------------------------------------ optimizers


def test_settings_are_the_defaults_with_what_was_asked_for() -> None:
    settled = optimizers.settle("kbfgsl", Settings(lr=0.1, damping_a=0.2))
    expected = optimizers.DEFAULTS["kbfgsl"].given() | {"lr": 0.1, "damping_a": 0.2}
    assert settled.given() == expected


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adamw", Settings(damping=0.3, memory=3), "adamw has no setting damping, memory"),
        ("kbfgs", Settings(memory=3), "kbfgs has no setting memory"),
        ("adam", Settings(), "unknown optimizer 'adam', expected one of kbfgs, kbfgsl, adamw"),
    ],
)
def test_foreign_settings_are_refused(name: str, settings: Settings, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        optimizers.settle(name, settings)


def test_flat_words_are_fields_of_the_constructors_rules() -> None:
    """Over those of a preset; rows and grids have the words of before."""
    words = {"lr": 1.0, "step_length": "layer", "restart_after": None, "factor_every": 2}
    factors = replace(presets.TUNED["factors"], restart_after=None, update_every=2)
    rules = {"direction": DirectionRule("newton", step_length="layer"), "factors": factors}
    wanted = presets.TUNED | {"lr": 1.0} | rules
    assert optimizers.options_of(words, presets.TUNED) == wanted
    polar = {"direction": DirectionRule(nesterov=False)}
    assert optimizers.options_of({"nesterov": False}) == polar
    newton = {"direction": DirectionRule("newton", nesterov=True)}
    assert optimizers.options_of({"direction": "newton", "nesterov": True}) == newton
    assert optimizers.options_of({}) == {}


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_every_optimizer_trains_every_parameter(name: str) -> None:
    if reason := optimizers.missing(name):
        pytest.skip(reason)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 5))
    settings = optimizers.settle(name, Settings())
    optimizer = optimizers.build(name, model, settings, 1e-5, half_squared_error)
    x = torch.rand(8, 5)
    before = [parameter.clone() for parameter in model.parameters()]
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = half_squared_error(model(x), x)
        loss.backward()
        return loss

    for _ in range(30):
        losses.append(float(optimizer.step(closure).detach()))
    assert losses[-1] < losses[0]
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)
    resolved = optimizers.resolved(name, optimizer, settings)
    assert resolved["lr"] == optimizer.defaults["lr"] == (settings.lr or 0.05)
    assert ("hessian_action" in resolved) == (name in optimizers.QUASI_NEWTON)


# ------------------------------------------------------------------ runs


def test_a_run_has_a_row_per_epoch_and_says_where_it_comes_from(
    images: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "run.json"
    run = train(config(), images, json_path=path)
    assert run.status == "complete"
    assert [row.epoch for row in run.rows] == [0, 1, 2]
    assert [row.steps for row in run.rows] == [0, 2, 4]
    assert run.rows[0].train_loss == pytest.approx(784 * math.log(2), rel=1e-2)
    assert run.rows[2].train_loss < run.rows[0].train_loss
    assert 0 == run.rows[0].seconds < run.rows[1].seconds < run.rows[2].seconds
    written = json.loads(path.read_text())
    assert written == json.loads(json.dumps(run.payload()))
    assert written["status"] == "complete"
    assert written["dataset"]["label"] == "noise (50)"
    assert written["config"]["settings"]["lr"] == optimizers.DEFAULTS["adamw"].lr
    assert written["environment"]["torch"] == torch.__version__
    assert list(path.parent.iterdir()) == [path]


def test_losses_are_the_published_notebooks(images: Dataset) -> None:
    run = train(config(epochs=0, weight_decay=0.5, seed=3), images)
    torch.manual_seed(3)
    model = AUTOENCODERS["mnist"].build()
    with torch.no_grad():
        expected = cross_entropy(model(images.test), images.test)
        expected += 0.25 * sum(p.square().sum() for p in model.parameters())
    assert run.rows[0].test_loss == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_weighs_a_short_last_batch_by_its_images(
    images: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AUTOENCODERS["mnist"].build()
    whole = training.mean_loss(model, cross_entropy, images.train)
    monkeypatch.setattr(training, "EVALUATION_BATCH", 8)
    assert training.mean_loss(model, cross_entropy, images.train) == pytest.approx(whole, rel=1e-6)


def test_the_seed_decides_everything(images: Dataset) -> None:
    def losses(seed: int) -> list[float]:
        return [row.train_loss for row in train(config(seed=seed), images).rows]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_batches_are_full() -> None:
    rows = torch.arange(7).view(7, 1)
    assert [batch.flatten().tolist() for batch in training.batches(rows, 3)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]


def test_evaluations_inside_an_epoch_change_nothing_else(images: Dataset) -> None:
    whole = train(config(batch_size=6), images).rows  # five steps an epoch
    parts = train(config(batch_size=6, evaluate_every=2), images).rows
    assert [row.epoch for row in parts] == [0, 0.4, 0.8, 1, 1.4, 1.8, 2]
    assert [row.steps for row in parts] == [0, 2, 4, 5, 7, 9, 10]
    assert [row.train_loss for row in parts[::3]] == [row.train_loss for row in whole]
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(parts))
    short = train(config(batch_size=6, evaluate_every=2, max_seconds=1e-9), images)
    assert (short.status, short.rows[-1].steps) == ("complete", 2)


@pytest.mark.parametrize("name", optimizers.QUASI_NEWTON)
@pytest.mark.parametrize("warm_start", [True, False], ids=["warm", "cold"])
def test_quasi_newton_runs_count_what_they_do(images: Dataset, name: str, warm_start: bool) -> None:
    run = train(config(optimizer=name, warm_start=warm_start, epochs=1), images)
    assert run.status == "complete"
    assert run.rows[0].counters == {}
    pairs = run.rows[1].counters["accepted"] + run.rows[1].counters["rejected"]
    assert pairs == 8 + 3  # a block of H_g each, in the first of two steps; 784 outputs have four
    assert (run.warm_start_seconds > 0) == warm_start
    assert run.rows[1].seconds > run.warm_start_seconds


def test_a_safeguard_rule_reaches_the_optimizer_and_the_file(images: Dataset) -> None:
    rule = SafeguardRule(shrink=0.25)
    settings = Settings(safeguard=rule)
    assert optimizers.settle("kbfgs", settings).safeguard is rule
    run = train(config(optimizer="kbfgs", settings=settings, epochs=0), images)
    written = json.loads(json.dumps(run.payload()))
    assert written["config"]["settings"]["safeguard"]["shrink"] == 0.25


def test_a_cosine_ends_at_zero_by_epochs_and_by_seconds(images: Dataset) -> None:
    constant = train(config(optimizer="sgdm", epochs=4), images)
    falling = train(config(optimizer="sgdm", epochs=4, schedule="cosine"), images)
    assert falling.rows[-1].train_loss != constant.rows[-1].train_loss
    late = train(config(optimizer="sgdm", schedule="cosine", max_seconds=1e-9), images)
    assert late.rows[-1].train_loss == pytest.approx(late.rows[0].train_loss)  # lr is 0 by then
    with pytest.raises(ValueError, match="schedule must be one of .*, got 'linear'"):
        config(schedule="linear")


def test_a_graph_reads_a_rate_that_is_annealed() -> None:
    group = {"lr": torch.tensor(2.0)}
    rate = group["lr"]
    optimizers.anneal(SimpleNamespace(param_groups=[group]), [2.0], 0.5)
    assert group["lr"] is rate and rate.item() == pytest.approx(1.0)


def test_captured_runs_are_of_those_that_can(images: Dataset) -> None:
    with pytest.raises(ValueError, match="captured steps are CUDA graphs, the device is cpu"):
        train(config(captured=True, device="cpu"), images)
    settings = optimizers.settle("muon", Settings())
    with pytest.raises(SettingsError, match="no graph follows the schedule of muon: only kbfgs,"):
        optimizers.build("muon", nn.Linear(2, 2), settings, 0.0, half_squared_error, captured=True)


@pytest.mark.parametrize("name", ["kbfgs", "adamw"])
def test_a_run_in_16_bits_is_nearly_that_in_32(images: Dataset, name: str) -> None:
    wanted = train(config(optimizer=name), images).rows[-1].train_loss
    for precision in ("tf32", "bf16", "fp16", "bf16-params"):
        run = train(config(optimizer=name, precision=precision), images)
        assert run.rows[-1].train_loss == pytest.approx(wanted, rel=0.02)
        assert run.payload()["config"]["precision"] == precision
    assert torch.get_float32_matmul_precision() == "highest"


def test_scaled_losses_are_for_those_that_can(images: Dataset) -> None:
    with pytest.raises(SettingsError, match="no gradient scaler steps muon: only kbfgs, kbfgsl,"):
        train(config(optimizer="muon", precision="fp16"), images)
    with pytest.raises(SettingsError, match="fp16 cannot be captured"):
        train(config(precision="fp16", captured=True), images)


def test_seconds_limit_a_run(images: Dataset) -> None:
    run = train(config(epochs=100, max_seconds=1e-9), images)
    assert run.status == "complete"
    assert run.rows[-1].epoch == 1


class Interrupt(Observer):
    """Presses Ctrl-C after the first epoch."""

    def evaluated(self, row: records.Row) -> None:
        """Stop at epoch 1."""
        if row.epoch == 1:
            raise KeyboardInterrupt


def test_an_interrupted_run_leaves_its_rows(images: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(KeyboardInterrupt):
        train(config(), images, observer=Interrupt(), json_path=path)
    written = json.loads(path.read_text())
    assert written["status"] == "interrupted"
    assert [row["epoch"] for row in written["rows"]] == [0, 1]


def test_an_unfinished_file_never_says_complete(images: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    seen = []

    class Reader(Observer):
        def evaluated(self, row: records.Row) -> None:
            seen.append(json.loads(path.read_text())["status"])

    train(config(), images, observer=Reader(), json_path=path)
    assert seen == ["interrupted"] * 3


@pytest.mark.parametrize("read_every", [0.0, math.inf], ids=["in the epoch", "after the epoch"])
def test_a_diverged_run_stops(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_every: float
) -> None:
    monkeypatch.setattr(training, "READ_EVERY", read_every)
    path = tmp_path / "run.json"
    settings = Settings(lr=1e20)
    run = train(config(optimizer="sgdm", settings=settings, epochs=9), images, json_path=path)
    assert run.status == "diverged"
    assert run.rows[-1].epoch == 1
    written = json.loads(path.read_text())
    assert written["status"] == "diverged"
    assert written["rows"][-1]["train_loss"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "cifar"}, "dataset must be one of mnist, curves, faces, got 'cifar'"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0, got nan"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"max_seconds": 0.0}, "max_seconds must be above 0, got 0"),
        ({"batch_size": 36}, r"batch_size 36 is larger than the training set \(35\)"),
    ],
)
def test_bad_configurations(images: Dataset, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(**changes), images)


# ------------------------------------------------------------------ environment


def test_environment_is_complete_and_ready_for_json() -> None:
    found = json.loads(json.dumps(environment("cpu")))
    assert set(found) == {
        *("commit", "dirty", "device", "device_type", "driver", "torch", "cuda", "triton"),
        *("kbfgs_ext", "python", "cpu", "threads"),
    }
    assert found["device"] == found["cpu"]
    assert found["threads"] == torch.get_num_threads()
