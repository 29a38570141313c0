"""Factors in blocks: what is kept, counted, said and saved, and the memory that it takes."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from kbfgs_ext import KBFGS, KBFGSL, DirectionRule
from tests.helpers.storage import StorageMeter
from tests.optim.models import DEFAULTS, assert_same, mlp, rows, snapshot
from tests.optim.test_blocks import ACTIONS, PLAIN, build


@DEFAULTS
@ACTIONS
def test_what_is_kept_and_counted(method, action):
    _, opt, closure = build(method, hessian_action=action, pair_every=1)
    predicted = opt.memory_usage()
    opt.warm_start([rows(12, 5), rows(4, 5)])
    for _ in range(4):
        opt.step(closure)
    assert opt.memory_usage() == predicted
    first, middle, _ = opt.layers
    assert first.has("H_a") and middle["H_a.0"].shape == middle["H_a.2"].shape == (7, 7)
    squares = 6 * 6 + 2 * 3 * 7 * 7
    assert predicted["H_a"] == squares * 8
    assert predicted.get("A", 0) == (squares * 8 if action == "ema" else 0)
    if method is KBFGS:
        assert predicted["H_g"] == (4 * 10 * 10 + 3 * 3) * 8
    pairs = {
        name: [int(counts["accepted" + side] + counts["rejected" + side]) for side in ("", "_a")]
        for name, counts in opt.diagnostics().items()
    }
    assert pairs == {"0": [8, 4], "2": [8, 12], "4": [4, 12]}  # four steps of each block
    assert [row.reason for row in opt.coverage()] == [
        "n_g in 2 blocks", "n_g in 2 blocks, n_a in 3 blocks", "n_a in 3 blocks",
    ]  # fmt: skip


@DEFAULTS
@ACTIONS
def test_a_restart_is_that_of_a_block(method, action):
    """A block that has refused its pairs starts again; its neighbour goes on."""
    factors = replace(PLAIN["factors"], restart_after=3)
    _, opt, closure = build(method, **{**PLAIN, "hessian_action": action, "factors": factors})
    for _ in range(3):
        opt.step(closure)
    layer = opt.layers[1]
    for factor in (layer.activations[0], layer.gradients[1]):
        counts = factor["counts_" + factor.side]
        counts.copy_(torch.tensor([0, 3, *counts[2:]]))  # and then none was accepted
    opt.step(closure)
    restarts = [int(f["marks_" + f.side][2]) for f in (*layer.activations, *layer.gradients)]
    assert restarts == [1, 0, 0, 0, 1]
    assert int(opt.diagnostics()["2"]["restarts"]) == int(opt.diagnostics()["2"]["restarts_a"]) == 1
    if method is KBFGS:
        eye = torch.eye(10, dtype=torch.float64)
        assert torch.equal(layer["H_g.1"], eye) and not torch.equal(layer["H_g.0"], eye)
    else:
        assert int(layer["pushed.1"]) == 0 < int(layer["pushed.0"])
    opt.restart()
    opt.step(closure)
    assert layer.started


@DEFAULTS
@ACTIONS
@pytest.mark.parametrize("block_size", [1, 10])
def test_training_and_resuming(method, action, block_size):
    model, opt, closure = build(method, block_size, hessian_action=action, lr=0.05)
    losses = [opt.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    copy, resumed, again = build(method, block_size, hessian_action=action, lr=0.05)
    copy.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step(closure)
        resumed.step(again)
    assert_same(snapshot(model, opt), snapshot(copy, resumed))


@DEFAULTS
def test_checkpoints_know_their_blocks(method):
    _, opt, closure = build(method, 10)
    opt.step(closure)
    saved = opt.state_dict()
    with pytest.raises(ValueError, match=r"layer '0' in blocks of \[10, 10\] and \[6\], .* one bl"):
        build(method, None)[1].load_state_dict(saved)
    _, opt, closure = build(method, 21)
    opt.step(closure)
    build(method, None)[1].load_state_dict(opt.state_dict())  # the same blocks


@DEFAULTS
def test_checkpoints_of_the_format_before(method):
    """They load where every side is one block; what had no factor is refused by name."""
    _, opt, closure = build(method, 50)
    for _ in range(2):
        opt.step(closure)
    saved = opt.state_dict()
    about = saved["param_groups"][0]["kbfgs"]
    assert about.pop("blocks") == {}
    about |= {"format": 5, "max_factor_dim": 8192}
    _, resumed, again = build(method, 21)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.layers[1]["H_a"], opt.layers[1]["H_a"])
    assert resumed.step(again) > 0
    with pytest.raises(ValueError, match=r"n_g and n_a of layer '0' in one block each, this opt"):
        build(method, 10)[1].load_state_dict(saved)
    about["max_factor_dim"] = 20
    with pytest.raises(ValueError, match=r"max_factor_dim = 20 left layer '2', .*\(20, 21\)"):
        build(method, 21)[1].load_state_dict(saved)


# ------------------------------------------------------------------ memory


@DEFAULTS
@ACTIONS
def test_the_head_of_a_language_model_in_stated_memory(method, action):
    """32,000 tokens: constructor and first step take what `memory_usage` says, and no surprise."""
    torch.manual_seed(0)
    width, tokens = 16, 32_000
    x, target = torch.randn(4, width), torch.randint(tokens, (4,))
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, tokens, bias=False))
    options = {"memory": 5} if method is KBFGSL else {}
    with warnings.catch_warnings(record=True) as said, StorageMeter() as meter:
        warnings.simplefilter("always")
        direction = DirectionRule("newton", step_length="layer", nesterov=True)
        opt = method(model, hessian_action=action, direction=direction, **options)
        stated = opt.memory_usage()

        def closure():
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            return loss

        made = meter.peak  # by the constructor: nothing of size
        opt.step(closure)
        first = meter.peak
        opt.zero_grad()
        held = meter.live
        meter.peak = held
        opt.step(closure)
    assert held == pytest.approx(stated["total"], rel=0.05)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    logits = 3 * 4 * len(x) * tokens  # they, their logarithms, their gradients
    assert made < 2**16
    assert max(first, meter.peak) <= 1.05 * stated["total"] + gradients + logits
    if method is KBFGS:
        assert stated["H_g"] == 4 * (16 * 2000**2 + width**2) < 4 * tokens * 2048
        assert stated["total"] < 5 * tokens * 2048
        assert len(said) == 1 and "more memory than the model" in str(said[0].message)
        assert "2: H_g 244 MiB" in str(said[0].message)
    else:
        assert stated["total"] < 12 * gradients and not said


def test_a_factor_larger_than_the_model_is_named_once():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8000, bias=False))
    with pytest.warns(UserWarning, match="more memory than the model.*: 1: H_g 244 MiB") as seen:
        KBFGS(model, block_size=None)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError), ("large", TypeError)]
)
def test_bad_values(value, error):
    with pytest.raises(error, match=f"block_size must be .*got {value!r}"):
        KBFGSL(mlp(4, 3), block_size=value)
