"""Layers in groups: one layer with stacks of blocks, its ops in one call, its memory as stated."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kbfgs_ext import KBFGS, KBFGSL, FactorRule
from tests.helpers.storage import StorageMeter
from tests.optim.models import DEFAULTS, assert_resumes, closure_of

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])


def depthwise(method, groups, dtype=torch.float32, **options):
    """A depthwise convolution and a Linear, the optimizer, and a closure."""
    torch.manual_seed(0)
    conv = nn.Conv2d(groups, groups, 3, padding=1, groups=groups)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(groups, 3))
    model.to(dtype)
    opt = method(model, **options)
    x, target = torch.randn(4, groups, 5, 5, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    return model, opt, closure_of(model, opt, x, target)


@DEFAULTS
@ACTIONS
def test_a_thousand_groups_are_one_layer(method, action):
    _, opt, closure = depthwise(method, 1000, hessian_action=action, pair_every=2, lr=1e-3)
    conv, _ = opt.layers
    stated = opt.memory_usage()
    losses = [opt.step(closure).item() for _ in range(6)]
    assert losses[-1] < losses[0] and opt.memory_usage() == stated
    assert conv["H_a"].shape == (1000, 10, 10) and conv["counts_a"].shape == (1000, 4)
    assert opt.coverage()[0].reason == "1000 groups" and opt.coverage().share == 1.0
    counts = opt.diagnostics()["0"]
    assert int(counts["accepted_a"] + counts["rejected_a"]) == 6 * 1000
    assert int(counts["accepted"] + counts["rejected"]) == 3 * 1000


class Calls(TorchDispatchMode):
    """How many ops have run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@DEFAULTS
@ACTIONS
def test_calls_do_not_grow_with_the_groups(method, action):
    """Those of torch's own ops; the package's take all groups in one call."""

    def calls(groups: int) -> int:
        _, opt, closure = depthwise(method, groups, hessian_action=action, pair_every=1)
        opt.step(closure)
        with Calls() as seen:
            opt.step(closure)
        return seen.count

    assert calls(4) == calls(64)


@DEFAULTS
@ACTIONS
def test_memory(method, action):
    """What is kept is what `memory_usage` says, stacks and all."""
    with StorageMeter() as meter:
        model, opt, closure = depthwise(method, 200, hessian_action=action)
        opt.step(closure)
        opt.zero_grad()
        held = meter.live
    own = opt.memory_usage()["total"]
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    rest += 4 * (4 * 200 * 25 + 12)  # the batch
    assert held == pytest.approx(own + rest, rel=0.05)


@DEFAULTS
@ACTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resuming_and_restarts(method, action, dtype):
    options = {"hessian_action": action, "factors": FactorRule(restart_after=1), "lr": 1e-3}
    opt, closure = assert_resumes(lambda: depthwise(method, 40, dtype, **options))
    opt.restart()
    opt.step(closure)


def test_checkpoints_know_their_groups():
    """A layer of as many outputs, and inputs of each, in one group."""

    def of(channels: int, groups: int) -> KBFGS:
        return KBFGS(nn.Sequential(nn.Conv2d(channels, 8, 1, groups=groups)))

    with pytest.raises(ValueError, match=r"groups\) is \[8, 5, 2\] there and \[8, 5\] here"):
        of(4, 1).load_state_dict(of(8, 2).state_dict())


@pytest.mark.parametrize("method", [KBFGS, KBFGSL])
def test_a_group_has_the_gate_and_the_restart_of_its_own(method):
    """One whose pairs were refused starts again, and its neighbour goes on."""
    factors = FactorRule(restart_after=3)
    _, opt, closure = depthwise(method, 5, torch.float64, factors=factors, lr=1e-4, pair_every=1)
    for _ in range(3):
        opt.step(closure)
    conv, _ = opt.layers
    for name in ("counts_a", "counts_g"):
        conv[name][2, :2] = torch.tensor([0, 3])  # and none was accepted since
    opt.step(closure)
    for name in ("marks_a", "marks_g"):
        assert conv[name][:, 2].tolist() == [0, 0, 1, 0, 0]
