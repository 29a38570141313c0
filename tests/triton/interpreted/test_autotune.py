"""Autotuning: opt-in, once per shape, and nothing of the state is touched by it."""

import pytest
import torch

from kbfgs_ext.ops import autotune
from kbfgs_ext.ops.factor_ema import triton as factor_ema
from kbfgs_ext.ops.kron_precondition import triton as kron
from tests.helpers import calls, cases, compare

CANDIDATES = {
    "factor_ema_": factor_ema.TILES,
    "kron_precondition_": kron.PRODUCTS["ieee"],
}


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(autotune, "REPEATS", 1)


def pretend(monkeypatch, fastest):
    """Measuring still runs every candidate; ``fastest`` wins."""
    measure = autotune._seconds
    measured = []

    def seconds(run, config, args, device):
        measured.append(config)
        measure(run, config, args, device)
        return 0.0 if config == fastest else 1.0

    monkeypatch.setattr(autotune, "_seconds", seconds)
    return measured


@pytest.mark.parametrize("op", sorted(CANDIDATES))
@pytest.mark.parametrize("which", [0, 2])
def test_result_is_the_chosen_candidate_run_once(op, which, monkeypatch):
    args = cases.first(op).build(torch.float32)
    fastest = CANDIDATES[op][which]
    module = factor_ema if op == "factor_ema_" else kron
    name = "TILES" if op == "factor_ema_" else "PRODUCTS"
    with monkeypatch.context() as alone:
        alone.setattr(module, name, {"ieee": (fastest,)} if module is kron else (fastest,))
        wanted = calls.run(op, args, "triton")
    assert not autotune.report()

    monkeypatch.setenv("KBFGS_AUTOTUNE", "1")
    measured = pretend(monkeypatch, fastest)
    for _ in range(2):
        got = calls.run(op, args, "triton")
        for (argument, g), (_, w) in zip(calls.flat(op, got), calls.flat(op, wanted), strict=True):
            compare.assert_same_bits(g, w, argument)
    assert measured == list(CANDIDATES[op])  # by the first call alone
    assert autotune.report() == {op: [fastest]}


def test_off_measures_nothing(monkeypatch):
    monkeypatch.delenv("KBFGS_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotune, "_seconds", None)
    calls.run("kron_step_", cases.first("kron_step_").build(torch.float32), "triton")
