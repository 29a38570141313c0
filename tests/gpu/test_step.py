"""Whole optimizer steps on a GPU: no host read, captured by a graph, the authors' trajectories."""

import copy

import pytest
import torch

from kbfgs_ext import KBFGS, KBFGSL
from tests.helpers import compare
from tests.optim import test_trajectories as trajectories
from tests.optim.models import closure_of, mlp, rows

pytestmark = pytest.mark.gpu
METHODS = pytest.mark.parametrize("method", [KBFGS, KBFGSL], ids=["kbfgs", "kbfgsl"])
ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
WARM_UP = 3  # steps before a capture: the first looks at a flag, and cuBLAS sets itself up


def problem(method, action, backend, sizes=(20, 33, 17)):
    torch.manual_seed(0)
    model = mlp(*sizes, dtype=torch.float32).cuda()
    opt = method(model, hessian_action=action, backend=backend)
    x = rows(64, sizes[0], torch.float32).cuda()
    target = rows(64, sizes[-1], torch.float32, seed=1).cuda()
    return model, opt, closure_of(model, opt, x, target)


@METHODS
@ACTIONS
def test_a_step_reads_nothing_back(backend, method, action):
    _, opt, closure = problem(method, action, backend)
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
def test_a_captured_step_is_the_eager_step(backend, method, action):
    replays = 5
    eager, eager_opt, eager_closure = problem(method, action, backend)
    captured, opt, closure = problem(method, action, backend)
    for _ in range(WARM_UP):
        eager_opt.step(eager_closure)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            opt.step(closure)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = opt.step(closure)
    for _ in range(replays):
        wanted = eager_opt.step(eager_closure)
        graph.replay()
    torch.cuda.synchronize()
    steps = WARM_UP + replays
    compare.assert_equal_to(loss.cpu(), wanted.cpu(), steps * 64, wanted.item(), "loss")
    for (name, p), q in zip(captured.named_parameters(), eager.parameters(), strict=True):
        scale = q.abs().max().item()
        compare.assert_equal_to(p.detach().cpu(), q.detach().cpu(), steps * 64, scale, name)


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
