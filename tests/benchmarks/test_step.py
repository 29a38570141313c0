"""The whole-step benchmark on networks of a few neurons: who steps, and when."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import optimizers
from benchmarks.baselines import kfac
from benchmarks.step import __main__ as command
from benchmarks.step import clock, counts, measure, models
from benchmarks.step.clock import PHASES
from benchmarks.step.measure import total
from benchmarks.step.models import Model
from benchmarks.step.providers import EAGER, GRAPH, Provider, chosen, fill_memory, providers
from kbfgs_ext import KBFGSL
from tests.helpers.compare import assert_equal_to
from tests.helpers.steps import BY_NAME, CPU, CUDA, EVERYONE, MLP, STACK, Ticking, runner

ADAMW, SOAP, KFAC = (BY_NAME[name] for name in ("AdamW, fused", "SOAP", "K-FAC"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MODELS", {})  # nothing large by accident
    for module in (measure, command):
        monkeypatch.setattr(module, "MODELS", {"mlp": MLP, "transformer": STACK})


# ------------------------------------------------------------------ everybody steps


@pytest.mark.parametrize("provider", EVERYONE, ids=lambda p: p.name)
def test_everyone_steps(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases add up to the step, and counts are those of every period."""
    made = runner(provider)
    monkeypatch.setattr(clock, "time", ticking := Ticking())
    made.step()
    assert sum(made.steps[-1].values()) == ticking.now - 1  # readings less one: the whole step
    divided = provider.name == KFAC.name or "K-BFGS" in provider.name
    for _ in range(provider.period):
        made.step()
    seen = set().union(*made.steps)
    assert seen == (set(PHASES) if divided else {"first pass", "other"})
    assert torch.isfinite(made.loss)
    assert all(count > 0 for count in made.counts.values())
    assert made.counts == counts.counts(made.step, provider.period, CPU)


@pytest.mark.parametrize(
    "provider", [p for p in EVERYONE if p.name not in STACK.senseless], ids=lambda p: p.name
)
def test_a_transformer_is_covered_but_for_its_norms(provider: Provider) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = runner(provider, STACK)
    made.step()
    assert torch.isfinite(made.loss)


def test_the_models_are_what_they_are_called() -> None:
    with torch.device("meta"):
        stack = models.MODELS["transformer"].build()
        linear = [m for m in stack.modules() if isinstance(m, torch.nn.Linear)]
        assert len(stack) == 12
        assert [(m.in_features, m.out_features) for m in linear[:4]] == [
            (768, 3 * 768), (768, 768), (768, 4 * 768), (4 * 768, 768),
        ]  # fmt: skip
        square = models.MODELS["mlp"].build()
        assert [m.weight.shape for m in square if isinstance(m, torch.nn.Linear)] == [
            (4096, 4096)
        ] * 4
    for name in ("mnist", "curves", "faces"):
        model = models.MODELS[name]
        with torch.device("meta"):
            assert model.build()[0].in_features == model.batch(2).shape[1]


def test_blocks_are_those_of_torch() -> None:
    """The same function as nn.TransformerEncoderLayer with the norms first."""
    torch.manual_seed(0)
    mine = models.Block(16, 4).double()
    torchs = torch.nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    names = {
        "qkv.weight": "self_attn.in_proj_weight", "qkv.bias": "self_attn.in_proj_bias",
        "out.": "self_attn.out_proj.", "mlp.0.": "linear1.", "mlp.2.": "linear2.",
    }  # fmt: skip
    state = {}
    for name, tensor in mine.state_dict().items():
        for my_name, its_name in names.items():
            name = name.replace(my_name, its_name)
        state[name] = tensor
    torchs.load_state_dict(state)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    assert_equal_to(mine(x), torchs(x), 100, 1.0)


def test_a_full_memory_of_equal_pairs_is_the_identity() -> None:
    """So that K-BFGS(L) is timed at the cost of all its pairs, from the same place."""
    weights = []
    for fill in (fill_memory, lambda opt: None):
        torch.manual_seed(0)
        network = MLP.build().double()
        opt = KBFGSL(network, memory=7)
        fill(opt)
        x = MLP.batch(8).double()

        def closure(opt=opt, network=network, x=x) -> Tensor:
            opt.zero_grad()
            loss = MLP.loss(network(x), x)
            loss.backward()
            return loss

        opt.step(closure)
        weights.append(network[0].weight.detach())
        assert int(opt.layers[0]["pushed"]) == (8 if fill is fill_memory else 1)
    assert_equal_to(weights[0], weights[1], 100, 1.0)


# ------------------------------------------------------------------ periods and turns


def test_one_step_of_each_period_makes_inverses(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(KFAC)
    inverted: list[int] = []
    monkeypatch.setattr(
        kfac, "damped_inverse", lambda f, lam: inverted.append(len(made.steps)) or f
    )
    made.steps.clear()
    for _ in range(3 * KFAC.period):
        made.step()
    at = sorted(set(inverted))
    assert len(at) == 3
    assert [b - a for a, b in itertools.pairwise(at)] == [KFAC.period] * 2


@pytest.mark.skipif(SOAP.missing is not None, reason=SOAP.missing or "")
def test_one_step_of_each_period_renews_the_bases() -> None:
    torch.manual_seed(0)
    network = MLP.build()
    opt = SOAP.make(network, MLP.loss)
    x = MLP.batch(8)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = MLP.loss(network(x), x)
        loss.backward()
        return loss

    renews = []
    for _ in range(SOAP.warm_up + 5 * SOAP.period):
        opt.step(closure)
        renews.append(opt._is_preconditioning)
    for i in range(5):
        start = SOAP.warm_up + i * SOAP.period
        assert sum(renews[start : start + SOAP.period]) == 1


def test_turns_are_taken_and_periods_are_whole(tiny: None) -> None:
    order: list[str] = []
    able = [BY_NAME[EAGER], ADAMW, KFAC]
    rows = measure.measure("mlp", able, CPU, rounds=4, tick=order.append)
    turns = order[-4 * 7 :]
    assert turns == 4 * [EAGER, ADAMW.name, *[KFAC.name] * 5]
    assert len(order) == measure.length(MLP, able, 4)
    assert [row["readings"] for row in rows] == [4, 4, 1]
    assert [total(KFAC, rounds) for rounds in (1, 20, 21)] == [20, 20, 40]


def test_a_reading_is_the_mean_of_a_period() -> None:
    made = runner(KFAC)
    made.steps = [{"first pass": 1.0, "other": 1.0}] * 19 + [{"first pass": 1.0, "curvature": 21.0}]
    (reading,) = made.readings()
    assert reading["first pass"] == 1.0
    assert reading["curvature"] == 21 / 20
    assert made.seconds() == [pytest.approx((19 * 2 + 22) / 20)]


def test_a_company_fits_in_memory_and_has_its_own_turns_of_eager(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model("MLP", MLP.build, MLP.shape, MLP.loss, 8, rounds=3, at_once=3)
    monkeypatch.setattr(measure, "MODELS", {"mlp": model})
    able = [p for p in EVERYONE if p.period == 1]
    order: list[str] = []
    alive: list[int] = []  # linear layers after each company has gone
    free = measure._free

    def freed(device: torch.device) -> None:
        free(device)
        alive.append(sum(type(each) is torch.nn.Linear for each in gc.get_objects()) - before)

    monkeypatch.setattr(measure, "_free", freed)
    gc.collect()
    before = sum(type(each) is torch.nn.Linear for each in gc.get_objects())
    rows = measure.measure("mlp", able, CPU, tick=order.append)
    assert [row["provider"] for row in rows] == [p.name for p in able]
    assert rows[0]["ratio_to_eager"] == 1.0
    companies = measure.companies(model, able[1:])
    assert max(map(len, companies)) == 2
    assert order.count(EAGER) == 3 + 3 * len(companies)
    assert alive == [3] * len(companies)  # those of the eager reference
    assert len(order) == measure.length(model, able, 3)


# ------------------------------------------------------------------ who is there, and who is not


def test_a_gpu_has_every_backend_eager_and_captured() -> None:
    found = {provider.name: provider for provider in providers(CUDA)}
    for method in ("K-BFGS", "K-BFGS(L)"):
        for action in ("ema", "minibatch"):
            for backend in ("auto", "triton"):
                plain = f"{method}, {action}, {backend}"
                assert not found[plain].captured
                assert found[plain + GRAPH].captured
    assert {"AdamW, fused" + GRAPH, "SGD, fused" + GRAPH, "Muon", "SOAP", "K-FAC"} <= set(found)
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in (found["K-BFGS, ema, triton"].missing or "")
        assert found["K-BFGS, ema, auto"].missing


def test_what_is_missing_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBFGS_DISABLE_NATIVE", "1")
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    able, left_out = chosen(providers(CPU), (), STACK, CPU)
    assert left_out == {
        **{
            f"{method}, {action}": "KBFGS_DISABLE_NATIVE=1"
            for method in ("K-BFGS", "K-BFGS(L)")
            for action in ("ema", "minibatch", "defaults")
        },
        "SOAP": "SOAP needs heavyball (pip install heavyball)",
        "K-FAC": "it is written for models of linear layers alone",
    }
    assert [p.name for p in able] == [p.name for p in EVERYONE if p.name not in left_out]


def test_what_takes_long_waits_to_be_asked() -> None:
    model = models.MODELS["mlp"]

    def has_kfac(*words: str, device: torch.device = CPU, patient: bool = False) -> bool:
        able, left_out = chosen([BY_NAME[EAGER], KFAC], words, model, device, patient)
        assert able[0].name == EAGER
        assert ("K-FAC" in left_out) == (not words and KFAC not in able)
        return KFAC in able

    assert not has_kfac()
    assert has_kfac(patient=True)
    assert has_kfac("fac")
    assert has_kfac(device=CUDA)
    assert not has_kfac("Muon")


def test_the_command_prints_a_table_and_writes_rows(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step.jsonl"
    line = f"--model mlp transformer --providers K-BFGS K-FAC fused --json {path}".split()
    for batch_size in (4, 6):  # the second time in place of the first
        assert command.main([*line, "--batch-size", str(batch_size)]) == 0
    printed = capsys.readouterr().out
    assert "transformer: K-FAC is left out: it is written for models of linear layers" in printed
    assert "MLP, batch 6, fp32" in printed
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert {row["batch_size"] for row in rows} == {6}
    for name in ("mlp", "transformer"):
        able, _ = chosen(EVERYONE, ("K-BFGS", "K-FAC", "fused"), {"mlp": MLP}.get(name, STACK), CPU)
        assert [r["provider"] for r in rows if r["dataset"] == name] == [p.name for p in able]
    for row in rows:
        assert {"commit", "dirty", "device", "torch", "threads", "precision", "seed"} <= set(row)
        assert 0 < row["ms"]["q20"] <= row["ms"]["q50"] <= row["ms"]["q80"]
        assert set(row["counts"]) == {"ops", "allocations", "bytes"}
        assert row["loss"] > 0


@pytest.mark.parametrize(
    ("precision", "products", "outputs", "parameters"),
    [
        ("fp32", "highest", torch.float32, torch.float32),
        ("tf32", "high", torch.float32, torch.float32),
        ("bf16", "high", torch.bfloat16, torch.float32),
        ("fp16", "high", torch.float16, torch.float32),
        ("bf16-params", "high", torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_precision_is_what_its_steps_run_in(
    tiny: None,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    products: str,
    outputs: torch.dtype,
    parameters: torch.dtype,
) -> None:
    seen = set()

    def look(module: torch.nn.Module, given: tuple, output: torch.Tensor) -> None:
        seen.add((torch.get_float32_matmul_precision(), output.dtype, module.weight.dtype))

    build = MLP.build

    def watched() -> torch.nn.Module:
        model = build()
        model[0].register_forward_hook(look)
        return model

    monkeypatch.setitem(measure.MODELS, "mlp", dataclasses.replace(MLP, build=watched))
    able, _ = chosen(EVERYONE, ("defaults", "AdamW"), MLP, CPU)
    rows = measure.measure("mlp", able, CPU, precision=precision)
    assert {row["precision"] for row in rows} == {precision}
    assert seen == {(products, outputs, parameters)}
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_no_gradient_scaler_steps_is_left_out() -> None:
    able, left_out = chosen(EVERYONE, ("defaults", "Muon", "K-FAC", "AdamW"), MLP, CPU, scaled=True)
    assert {"AdamW, fused", "K-BFGS, defaults"} <= {provider.name for provider in able}
    assert left_out == dict.fromkeys(["Muon", "K-FAC"], "no gradient scaler steps it")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--precision int8", "invalid choice: 'int8'"),
        ("--providers Lion", "no name holds 'Lion': eager K-BFGS, ema, full second pass; "),
        ("--rounds 0", "must be at least 1, got 0"),
        ("--model cifar", "invalid choice: 'cifar'"),
    ],
)
def test_usage_errors(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(line.split())
    assert message in capsys.readouterr().err


def test_a_network_that_diverged_is_named(
    tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(command.MODELS, "mlp", MLP)
    wild = Provider("wild", lambda model, loss: torch.optim.SGD(model.parameters(), lr=1e30))
    monkeypatch.setattr(command, "providers", lambda device: (BY_NAME[EAGER], wild))
    assert command.main(["--model", "mlp"]) == 0
    assert "mlp: wild has diverged" in capsys.readouterr().out
