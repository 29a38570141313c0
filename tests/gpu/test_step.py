"""Whole optimizer steps on a GPU: no host read, captured by a graph, the authors' trajectories."""

import copy

import pytest
import torch

from kbfgs_ext import KBFGS, CapturedStep, DirectionRule
from tests.helpers import compare
from tests.optim import test_trajectories as trajectories
from tests.optim.captured import CapturedRun
from tests.optim.models import METHODS, assert_same, closure_of, mlp, rows

pytestmark = pytest.mark.gpu
ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
LENGTHS = pytest.mark.parametrize("length", ["direction", "balanced", "layer"])
WARM_UP = 3  # steps before a capture: the first looks at a flag, and cuBLAS sets itself up


SIZES = (20, 33, 17)


def batch(seed=0):
    return rows(64, SIZES[0], torch.float32, seed), rows(64, SIZES[-1], torch.float32, seed + 100)


def half_squared_error(model, x, target):
    return (model(x) - target).square().sum() / (2 * x.shape[0])


def problem(method, action, backend, **options):
    torch.manual_seed(0)
    model = mlp(*SIZES, dtype=torch.float32).cuda()
    opt = method(model, hessian_action=action, backend=backend, **options)
    x, target = (t.cuda() for t in batch())
    return model, opt, closure_of(model, opt, x, target)


@METHODS
@ACTIONS
@LENGTHS
def test_a_step_reads_nothing_back(backend, method, action, length):
    _, opt, closure = problem(
        method, action, backend, direction=DirectionRule("newton", step_length=length)
    )
    for _ in range(WARM_UP):
        opt.step(closure)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            opt.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@METHODS
@ACTIONS
@LENGTHS
def test_a_captured_step_is_the_eager_step(backend, method, action, length):
    """With the learning rate changed between replays."""
    steps = 2 * WARM_UP + 3
    eager, eager_opt, _ = problem(
        method, action, backend, direction=DirectionRule("newton", step_length=length)
    )
    captured, opt, _ = problem(
        method, action, backend, direction=DirectionRule("newton", step_length=length)
    )
    step = CapturedStep(opt, lambda x, target: half_squared_error(captured, x, target))
    for i in range(steps):
        x, target = (t.cuda() for t in batch(seed=i))
        for group in (eager_opt.param_groups[0], opt.param_groups[0]):
            group["lr"] = 0.3 / (1 + i)
        wanted = eager_opt.step(closure_of(eager, eager_opt, x, target))
        loss = step(x, target)
        compare.assert_equal_to(
            loss.cpu(), wanted.detach().cpu(), steps * 64, wanted.item(), "loss"
        )
    assert step.captured
    for (name, p), q in zip(captured.named_parameters(), eager.parameters(), strict=True):
        scale = q.abs().max().item()
        compare.assert_equal_to(p.detach().cpu(), q.detach().cpu(), steps * 64, scale, name)


def test_random_numbers_are_refused(backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(20, 17)).cuda()
    step = CapturedStep(KBFGS(model, backend=backend), lambda x: model(x).square().mean())
    with pytest.raises(RuntimeError, match="draws random numbers"):
        step(torch.ones(64, 20, device="cuda"))


@pytest.mark.parametrize("run", trajectories.RUNS, ids=lambda run: run["name"])
def test_trajectory(backend, run, monkeypatch):
    """The authors' own losses, in float64 on the GPU."""
    on_cpu = trajectories.regenerate

    def on_gpu(run):
        model, batches = on_cpu(run)
        return model.cuda(), [batch.cuda() for batch in batches]

    monkeypatch.setattr(trajectories, "regenerate", on_gpu)
    losses, _, _ = trajectories.replay(run, backend=backend)
    assert losses == pytest.approx(run["losses"], rel=trajectories.TOLERANCE)


@METHODS
def test_a_resumed_run_continues_bit_for_bit(backend, method):
    model, opt, closure = problem(method, "ema", backend)
    for _ in range(WARM_UP):
        opt.step(closure)
    twin, twin_opt, twin_closure = problem(method, "ema", backend)
    twin.load_state_dict(model.state_dict())
    twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(2):
        opt.step(closure)
        twin_opt.step(twin_closure)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        compare.assert_same_bits(p.detach().cpu(), q.detach().cpu())


@METHODS
@pytest.mark.parametrize("fallback", [False, True], ids=["linear only", "fallback"])
@pytest.mark.parametrize("at", [2, 6], ids=["in the warm-up", "after the capture"])
def test_a_resumed_captured_run_continues_bit_for_bit(backend, method, fallback, at):
    """With a schedule, read back by way of the CPU; without a GPU: test_captured_step.py."""
    through, resumed = (
        CapturedRun(method, fallback, "cuda", torch.float32, backend=backend) for _ in range(2)
    )
    through(range(at))
    resumed.load(through.save(), map_location="cpu")
    rest = range(at, at + WARM_UP + 3)
    assert through(rest) == resumed(rest)
    assert through.step.captured and resumed.step.captured
    assert_same(through.everything(), resumed.everything())
