"""CapturedStep without a GPU: an ordinary step on the CPU, and what it does around a capture.

The capture itself is stood in for by a graph that runs on replay what it was given; on a GPU
tests/gpu/test_step.py takes the real one.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kbfgs_ext import KBFGS, KBFGSL, CapturedStep
from kbfgs_ext.optim import graph
from tests.optim.models import assert_same, mlp, rows, snapshot

METHODS = pytest.mark.parametrize("method", [KBFGS, KBFGSL], ids=["kbfgs", "kbfgsl"])
BATCHES = [(rows(16, 5, seed=i), rows(16, 3, seed=100 + i)) for i in range(8)]


class FakeGraph:
    """Runs nothing when made, as a capture, and everything on replay."""

    def __init__(self, run, device):
        self._run = run
        self.result = torch.zeros((), dtype=torch.float64)

    def replay(self):
        self.result.copy_(self._run())


@pytest.fixture
def as_if_cuda(monkeypatch):
    monkeypatch.setattr(graph, "Graph", FakeGraph)
    monkeypatch.setattr(KBFGS, "device", torch.device("cuda"))
    monkeypatch.setattr(CapturedStep, "_on_the_side", CapturedStep._ordinary)


def made(method=KBFGS, model=None, **options):
    torch.manual_seed(0)
    model = model or mlp(5, 7, 3)
    opt = method(model, **options)
    return model, opt, CapturedStep(opt, lambda x, target: F.mse_loss(model(x), target))


def several(step):
    for batch in BATCHES:
        step(*batch)


def eager(method, batches, **options):
    model, opt, _ = made(method, **options)
    losses = []
    for x, target in batches:

        def closure(x=x, target=target):
            opt.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
    return model, opt, losses


@METHODS
def test_on_the_cpu_every_call_is_an_ordinary_step(method):
    model, opt, step = made(method)
    losses = [step(*batch).item() for batch in BATCHES]
    assert not step.captured
    plain, plain_opt, wanted = eager(method, BATCHES)
    assert losses == wanted
    assert_same(snapshot(model, opt), snapshot(plain, plain_opt))


@METHODS
def test_captured_steps_are_the_ordinary_ones(method, as_if_cuda, monkeypatch):
    model, opt, step = made(method)
    calls = []
    opt.register_step_pre_hook(lambda *a: calls.append("before"))
    opt.register_step_post_hook(lambda *a: calls.append("after"))
    losses = [step(*batch).item() for batch in BATCHES]
    assert step.captured
    assert calls == ["before", "after"] * len(BATCHES)
    monkeypatch.undo()
    plain, plain_opt, wanted = eager(method, BATCHES)
    assert losses == wanted
    assert_same(snapshot(model, opt), snapshot(plain, plain_opt))


def test_lr_and_damping_change_between_replays(as_if_cuda, monkeypatch):
    _, opt, step = made()
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for batch in BATCHES:
        step(*batch)
        schedule.step()
        opt.param_groups[0]["damping"] *= 1.5
        scalars = opt._covered[0].scalars
        before = scalars.lr.item()
    assert step.captured
    assert before == 0.3 * 0.5 ** (len(BATCHES) - 1)
    assert scalars.lam_a.item() == pytest.approx((0.3 * 1.5 ** (len(BATCHES) - 1)) ** 0.5)


def test_what_is_part_of_the_graph_may_not_change(as_if_cuda):
    _, opt, step = made()
    for batch in BATCHES[:5]:
        step(*batch)
    opt.param_groups[0]["momentum"] = 0.5
    with pytest.raises(RuntimeError, match="momentum, .* have changed since"):
        step(*BATCHES[5])


def test_a_loaded_checkpoint_voids_the_capture(as_if_cuda):
    _, opt, step = made()
    several(step)
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="a checkpoint was loaded"):
        step(*BATCHES[0])


def test_inputs_must_be_as_captured(as_if_cuda):
    _, _, step = made()
    for batch in BATCHES[:5]:
        step(*batch)
    with pytest.raises(ValueError, match="as captured.*drop_last"):
        step(BATCHES[5][0][:3], BATCHES[5][1][:3])
    with pytest.raises(TypeError, match="input 0 must be a tensor, got list"):
        step([1.0], BATCHES[5][1])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pair_every": 2}, "pair_every or factor_every"),
        ({"factor_every": 3}, "pair_every or factor_every"),
        ({"lr": torch.tensor(0.3)}, "a tensor on the CPU"),
    ],
)
def test_what_cannot_be_captured_is_refused(options, reason, as_if_cuda):
    _, _, step = made(**options)
    with pytest.raises(RuntimeError, match=reason):
        several(step)


@pytest.mark.filterwarnings("ignore:KBFGS covers")
def test_a_fallback_that_counts_on_the_host_is_refused(as_if_cuda):
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    _, _, step = made(model=model)
    with pytest.raises(RuntimeError, match="capturable=True"):
        several(step)


def test_bad_arguments():
    model, opt, _ = made()
    with pytest.raises(TypeError, match="optimizer must be a KBFGS or KBFGSL, got SGD"):
        CapturedStep(torch.optim.SGD(model.parameters()), lambda: None)
    with pytest.raises(TypeError, match="loss_function must be a function, got 3"):
        CapturedStep(opt, 3)
    with pytest.raises(ValueError, match="warm_up must be an int of at least 2, got 1"):
        CapturedStep(opt, lambda: None, warm_up=1)
