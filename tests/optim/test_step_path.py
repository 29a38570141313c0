"""The step path: no host read, no growing memory, memory as predicted, resuming bit for bit."""

import copy
import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step.counts import OpCounter
from kbfgs_ext import KBFGS, KBFGSL, DirectionRule, presets
from kbfgs_ext.ops import registry
from kbfgs_ext.optim import gradients
from tests.helpers.storage import StorageMeter
from tests.optim.models import METHODS, closure_of, mlp, newton_l, rows

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])


@METHODS
@ACTIONS
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("length", ["direction", "balanced", "layer"])
def test_no_host_read(method, action, backend, length):
    """A fake tensor has no value, so any read of one raises: whole steps run on fakes."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(
            nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Dropout(), nn.BatchNorm1d(7), nn.Linear(7, 3)
        )
        direction = DirectionRule("newton", step_length=length)
        opt = method(model, hessian_action=action, backend=backend, direction=direction)
        x, target = torch.randn(8, 5), torch.randn(8, 3)
        for _ in range(3):
            opt.step(closure_of(model, opt, x, target))
        assert opt.layers[0]["H_a"].shape == (6, 6)


@METHODS
def test_the_one_look_is_at_the_start(method, monkeypatch):
    """The flag of `known_true` is read for the first step alone."""
    model = mlp(5, 7, 3)
    opt = method(model)
    closure = closure_of(model, opt, rows(8, 5), rows(8, 3))
    opt.step(closure)
    monkeypatch.setattr(
        gradients, "known_true", lambda flag: pytest.fail("host read after the start")
    )
    for _ in range(3):
        opt.step(closure)


@METHODS
@ACTIONS
@pytest.mark.parametrize("block_size", [None, 64])
def test_memory_is_what_was_predicted(method, action, block_size):
    """Live bytes that the optimizer adds, and its peak in a step, within 5% of memory_usage()."""
    model = mlp(150, 200, 120, dtype=torch.float32)
    x, target = rows(2, 150, torch.float32), rows(2, 120, torch.float32)
    options = {"memory": 20} if method is newton_l else {}
    with StorageMeter() as meter:
        opt = method(model, hessian_action=action, block_size=block_size, **options)
        predicted = opt.memory_usage()
        closure = closure_of(model, opt, x, target)
        for _ in range(2):
            opt.step(closure)
        opt.zero_grad()
        held = meter.live
        meter.peak = held
        opt.step(closure)
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held == pytest.approx(predicted["total"], rel=0.05)
    if registry.available("kron_step_", "cpu"):
        # what a step needs on top: the gradients and this tiny batch's activations
        assert meter.peak - gradients == pytest.approx(predicted["total"], rel=0.05)
    assert opt.memory_usage() == predicted


@ACTIONS
@pytest.mark.skipif(not registry.available("judge_", "cpu"), reason="needs the compiled extension")
def test_kernels_around_the_passes_do_not_grow_with_the_layers(action):
    """On a GPU each is a launch: all layers go in one call, and the scalars in few. (The products
    that the extension asks the BLAS for are not among them: no dispatcher sees those.)"""
    found = []
    for layers in (2, 9):
        model = mlp(*[6] * (layers + 1))
        opt = KBFGS(model, **{**presets.TUNED, "hessian_action": action})
        x, target, count = rows(16, 6), rows(16, 6, seed=1), OpCounter()
        for _ in range(3):
            with opt.first_pass():
                opt.zero_grad()
                loss = nn.functional.mse_loss(model(x), target)
                loss.backward()
            with count:
                opt.descend(loss)
            with opt.second_pass():
                loss = nn.functional.mse_loss(model(x), target)
                loss.backward()
            with count:
                opt.finish(loss)
            last, count.count = count.count, 0
        found.append(last)
    assert found[0] == found[1] <= 22


RESUME = textwrap.dedent("""
    import sys, torch
    from tests.optim.test_step_path import build, run
    resumed = []
    for state in torch.load(sys.argv[1]):
        model, opt, schedule = build(**state["how"])
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        run(model, opt, schedule, range(6, 12))
        resumed.append([p.detach() for p in model.parameters()])
    torch.save(resumed, sys.argv[2])
""")


def build(limited: bool, action: str, fallback: bool):
    """A model with dropout (and a norm for the fallback), its optimizer and a scheduler."""
    torch.manual_seed(1)
    norm = [nn.LayerNorm(9)] if fallback else []
    model = nn.Sequential(nn.Linear(6, 9), *norm, nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 4))
    options = {"fallback": torch.optim.AdamW} if fallback else {}
    if limited:
        opt = KBFGSL(model, memory=4, hessian_action=action, lr=1.0, **options)
    else:
        opt = KBFGS(model, hessian_action=action, lr=1.0, **options)
    return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)


def run(model, opt, schedule, steps):
    """Training steps on batches that depend on the step's number alone."""
    for k in steps:
        x, target = rows(16, 6, torch.float32, seed=k), rows(16, 4, torch.float32, seed=100 + k)
        opt.step(closure_of(model, opt, x, target))
        schedule.step()


def test_resume_in_a_new_process_is_bit_identical(tmp_path):
    """Both methods, both actions, with and without a fallback; one process resumes them all."""
    ways = [
        {"limited": limited, "action": action, "fallback": fallback}
        for limited in (False, True)
        for action in ("ema", "minibatch")
        for fallback in (False, True)
    ]
    saved, models = [], []
    for how in ways:
        model, opt, schedule = build(**how)
        run(model, opt, schedule, range(6))
        saved.append(
            copy.deepcopy(
                {
                    "how": how,
                    "model": model.state_dict(),
                    "opt": opt.state_dict(),
                    "schedule": schedule.state_dict(),
                    "rng": torch.get_rng_state(),
                }
            )
        )
        run(model, opt, schedule, range(6, 12))
        assert int(opt.counters()["steps"]) == 12
        models.append(model)
    torch.save(saved, tmp_path / "saved.pt")

    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", RESUME, tmp_path / "saved.pt", tmp_path / "resumed.pt"]
    subprocess.run(command, check=True, cwd=root, timeout=120)
    for how, model, resumed in zip(ways, models, torch.load(tmp_path / "resumed.pt"), strict=True):
        for p, q in zip(model.parameters(), resumed, strict=True):
            assert torch.equal(p, q), how


def test_state_is_published_and_serialisable(tmp_path):
    model = mlp(5, 7, 3)
    opt = KBFGS(model, lr=torch.tensor(0.3))
    opt.step(closure_of(model, opt, rows(8, 5), rows(8, 3)))
    assert set(opt.state[model[0].weight]) >= {"M", "H_a", "H_g", "s", "y"}
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    about = torch.load(tmp_path / "opt.pt")["param_groups"][0]["kbfgs"]
    assert json.loads(json.dumps(about))["layers"] == {"0": [7, 6], "2": [3, 8]}


def test_add_param_group_covers_an_unfrozen_layer():
    model = mlp(5, 7, 3)
    model[2].requires_grad_(False)
    opt = KBFGS(model, lr=0.2)
    x, target = rows(8, 5), rows(8, 3)
    opt.step(closure_of(model, opt, x, target))
    model[2].requires_grad_(True)
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    assert [g["lr"] for g in opt.param_groups] == [0.2, 0.1]
    before = model[2].weight.detach().clone()
    opt.step(closure_of(model, opt, x, target))
    assert not torch.equal(before, model[2].weight)
    with pytest.raises(ValueError, match="in another param group already"):
        opt.add_param_group({"params": model[2].parameters()})
