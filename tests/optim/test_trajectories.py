"""The authors' own trajectories, to rounding: the whole method at once."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kbfgs_ext import KBFGS, KBFGSL, presets
from kbfgs_ext.ops import registry
from tests.optim.models import closure_of, mlp

RUNS = json.loads((Path(__file__).parents[1] / "data" / "trajectories.json").read_text())
TOLERANCE = 1e-10  # relative, on losses and weight sums


def regenerate(run: dict) -> tuple[torch.nn.Sequential, list[torch.Tensor]]:
    """Model and batches of a run: one numpy stream gives the data, then the weights."""
    rng = np.random.RandomState(run["seed"])
    sizes, N, mb = run["sizes"], run["N"], run["mb"]
    Z = rng.randn(N, 6) @ rng.randn(6, sizes[0])
    X = torch.from_numpy((1 / (1 + np.exp(-Z))).astype(np.float32).astype(np.float64))
    model = mlp(*sizes)
    for i, layer in enumerate(m for m in list(model) if isinstance(m, torch.nn.Linear)):
        k = 1 / np.sqrt(sizes[i])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(rng.uniform(-k, k, (sizes[i + 1], sizes[i]))))
            layer.bias.copy_(torch.from_numpy(rng.uniform(-k, k, sizes[i + 1])))
    for i in run["linear"]:
        if 2 * i + 1 < len(model):
            model[2 * i + 1] = torch.nn.Identity()
    return model, list(X.split(mb))


def replay(run: dict, **options) -> tuple[list[float], list[float], object]:
    """Losses, final weight sums and the optimizer of a run."""
    model, batches = regenerate(run)
    options = {
        **presets.PUBLISHED,
        "lr": run["lr"],
        "damping": run["lam"],
        "weight_decay": run["wd"],
        **options,
    }
    if run["alg"] == "K-BFGS":
        opt = KBFGS(model, **options)
    else:
        opt = KBFGSL(model, memory=run["p"], **options)
    opt.warm_start(batches)
    losses = []
    for i in range(run["iters"]):
        x = batches[i % len(batches)]
        losses.append(opt.step(closure_of(model, opt, x, x)).item())
    sums = [m.weight.sum().item() for m in model if isinstance(m, torch.nn.Linear)]
    return losses, sums, opt


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("run", RUNS, ids=[f"{r['alg']}-{r['name']}" for r in RUNS])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "full"])
def test_trajectory(run, backend, frozen):
    if not registry.available("kron_step_", backend):
        pytest.skip("needs the compiled extension: pip install -e . --no-build-isolation")
    factors = dataclasses.replace(presets.PUBLISHED["factors"], freeze_second_pass=frozen)
    losses, sums, opt = replay(run, backend=backend, factors=factors)
    assert losses == pytest.approx(run["losses"], rel=TOLERANCE)
    assert sums == pytest.approx(run["wsum"], rel=TOLERANCE)

    seen = opt.diagnostics().values()
    counts = run["counts"]
    assert sum(int(d["powell_damped"]) for d in seen) == counts["powell"]
    assert sum(int(d["lm_damped"]) for d in seen) == counts["lm"]
    assert sum(int(d["accepted"]) for d in seen) == counts["n1"] - counts["rej"]


def test_runs_exercise_what_they_should():
    """Both methods; both dampings fire; the ring of K-BFGS(L) wraps around."""
    assert {run["alg"] for run in RUNS} == {"K-BFGS", "K-BFGS(L)"}
    for run in RUNS:
        assert run["counts"]["powell"] > 0 and run["counts"]["lm"] > 0
        assert run["iters"] > 2 * run["p"]
