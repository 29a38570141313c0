"""The peak of a step: what the optimizer says that it keeps, and what forward and backward take."""

import warnings

import pytest
import torch
from torch import nn

from kbfgs_ext.optim import inputs
from tests.helpers.storage import StorageMeter
from tests.optim.models import DEFAULTS, closure_of

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])


def network() -> nn.Module:
    """A small ResNet's kinds of layers, whose activations weigh about as much as its factors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 3),
    )  # fmt: skip


@DEFAULTS
@ACTIONS
def test_the_peak_of_a_step(method, action, monkeypatch):
    """Within 5 %, of the first step too, and of one with a second pass."""
    monkeypatch.setattr(inputs, "BLOCK", 2**14)  # patches: 64 KiB at a time
    x, target = torch.randn(48, 3, 12, 12), torch.randn(48, 3)
    with StorageMeter() as meter:
        model = network()
        plain = torch.optim.SGD(model.parameters())
        before = meter.live
        for _ in range(2):
            plain.zero_grad()
            meter.peak = meter.live
            closure_of(model, plain, x, target)()
        passes = meter.peak - before
    with StorageMeter() as meter, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = network()
        before = meter.live
        opt = method(model, hessian_action=action, pair_every=2)
        peaks = []
        for _ in range(4):
            opt.zero_grad()
            meter.peak = meter.live
            opt.step(closure_of(model, opt, x, target))
            peaks.append(meter.peak - before)
        opt.zero_grad()
        held = meter.live - before
    stated = opt.memory_usage()["total"]
    assert passes > 0.5 * stated
    assert held == pytest.approx(stated, rel=0.05)
    for peak in peaks:
        assert peak <= 1.05 * (stated + passes)
