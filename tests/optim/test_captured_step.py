"""CapturedStep without a GPU: an ordinary step on the CPU, and what it does around a capture.

The capture itself is stood in for by a tape of the step's ops (tests/helpers/tape.py); on a GPU
tests/gpu/test_step.py takes the real one.
"""

import contextlib
import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kbfgs_ext import KBFGS, CapturedStep, DirectionRule, FactorRule
from kbfgs_ext.optim import graph, hyper, recorder
from tests.helpers.tape import Tape
from tests.optim.captured import CapturedRun
from tests.optim.models import METHODS, assert_same, mlp, newton, newton_l, rows, snapshot

BATCHES = [(rows(16, 5, seed=i), rows(16, 3, seed=100 + i)) for i in range(8)]


@pytest.fixture
def as_if_cuda(monkeypatch):
    monkeypatch.setattr(graph, "Graph", Tape)
    monkeypatch.setattr(KBFGS, "device", torch.device("cuda"))
    monkeypatch.setattr(CapturedStep, "_on_the_side", CapturedStep._ordinary)


@pytest.fixture
def scalars_too(as_if_cuda, monkeypatch):
    """Tensors of the param groups pass for tensors on the device, in torch's AdamW as well."""
    monkeypatch.setattr(graph, "_on_host", lambda value: False)
    monkeypatch.setattr(hyper, "check_group", lambda group: None)  # looks at values on the host
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **_: ["cpu"])


def made(method=newton, model=None, **options):
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
@pytest.mark.parametrize("length", ["direction", "balanced", "layer"])
def test_captured_steps_are_the_ordinary_ones(method, length, as_if_cuda, monkeypatch):
    model, opt, step = made(method, direction=DirectionRule("newton", step_length=length))
    calls = []
    opt.register_step_pre_hook(lambda *a: calls.append("before"))
    opt.register_step_post_hook(lambda *a: calls.append("after"))
    losses = [step(*batch).item() for batch in BATCHES]
    assert step.captured
    assert calls == ["before", "after"] * len(BATCHES)
    monkeypatch.undo()
    plain, plain_opt, wanted = eager(
        method, BATCHES, direction=DirectionRule("newton", step_length=length)
    )
    assert losses == wanted
    assert_same(snapshot(model, opt), snapshot(plain, plain_opt))


@METHODS
@pytest.mark.parametrize("every", [(3, 1), (1, 3), (3, 2)], ids=str)
def test_steps_of_several_kinds_are_captured_one_by_one(method, every, as_if_cuda, monkeypatch):
    """A second pass in some steps, activations in some: a graph of each kind."""
    options = {
        "pair_every": every[0],
        "factors": FactorRule(update_every=every[1]),
        "direction": DirectionRule("newton", nesterov=True),
    }
    batches = BATCHES + BATCHES
    model, opt, step = made(method, **options)
    losses = [step(*batch).item() for batch in batches]
    kinds = {(i % every[0] == 0, i % every[1] == 0) for i in range(len(batches))}
    assert set(step._graphs) == kinds
    monkeypatch.undo()
    plain, plain_opt, wanted = eager(method, batches, **options)
    assert losses == wanted
    assert_same(snapshot(model, opt), snapshot(plain, plain_opt))


def numbers(group, k):
    group["lr"], group["damping"] = 0.3 * 0.5**k, 0.3 * 1.5**k


def tensors_in_place(group, k):
    group["lr"].fill_(0.3 * 0.5**k)
    group["damping"].fill_(0.3 * 1.5**k)


def new_tensors(group, k):
    group["lr"], group["damping"] = torch.tensor(0.3 * 0.5**k), torch.tensor(0.3 * 1.5**k)


@METHODS
@pytest.mark.parametrize("change", [numbers, tensors_in_place, new_tensors])
def test_lr_and_damping_change_between_calls(method, change, scalars_too):
    """Before every call: so also before the one that captures, which must not keep them."""
    ends = []
    for captured in (True, False):
        model, opt, step = made(method, lr=torch.tensor(0.3), damping=torch.tensor(0.3))
        losses = []
        for k, batch in enumerate(BATCHES):
            change(opt.param_groups[0], k)
            losses.append((step(*batch) if captured else step._ordinary(batch)).item())
        assert step.captured == captured
        ends.append((losses, snapshot(model, opt)))
    assert ends[0][0] == ends[1][0]
    assert_same(ends[0][1], ends[1][1])


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


@METHODS
@pytest.mark.parametrize("fallback", [False, True], ids=["linear only", "fallback"])
@pytest.mark.parametrize("at", [2, 3, 6], ids=["in the warm-up", "before the capture", "after it"])
def test_resume(method, fallback, at, scalars_too):
    """Saved anywhere, a run goes on bit for bit in a new optimizer and a new CapturedStep."""
    options = {"memory": 3} if method is newton_l else {"hessian_action": "ema"}
    through = CapturedRun(method, fallback, **options)
    through(range(at))
    assert through.step.captured == (at > graph.WARM_UP)
    file = through.save()
    resumed = CapturedRun(method, fallback, **options)
    resumed.load(file)
    rest = range(at, at + graph.WARM_UP + 3)
    assert through(rest) == resumed(rest)
    assert through.step.captured and resumed.step.captured
    assert_same(through.everything(), resumed.everything())
    assert int(resumed.opt.counters()["steps"]) == resumed.opt.steps.number == rest.stop


class Forgetful:
    """A capture that keeps no tensor alive, as a graph does not."""

    def __init__(self, run, device):
        self.result = run()

    def replay(self):
        pass


def test_a_capture_keeps_what_it_writes(as_if_cuda, monkeypatch):
    """The copies of buffers and of the fallback's parameters, though a later step makes others."""
    monkeypatch.setattr(graph, "Graph", Forgetful)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).double()
    model, opt, step = made(model=model, fallback=lambda p: torch.optim.SGD(p, lr=0.1))
    several(step)
    written = opt.steps.copies()
    # The norm's parameters as they were and their changes, in one piece each, and its buffers.
    assert len(written) == 2 + 3
    alive = [weakref.ref(t) for t in written]
    norm, written = model[1], None
    norm.bias.requires_grad_(False)
    norm.register_buffer("running_mean", torch.zeros(7, dtype=torch.float64))
    x, target = BATCHES[0]

    def closure():
        opt.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        return loss

    opt.step(closure)
    assert all(copy() is not None for copy in alive)
    step._held.clear()
    assert any(copy() is None for copy in alive)


def test_a_failed_capture_counts_no_step(as_if_cuda):
    model, opt, _ = made()
    losses = []

    def noisy(x, target):
        losses.append(F.mse_loss(model(x), target))
        if len(losses) == 2 * (graph.WARM_UP + 1):  # the second pass of the capture
            losses[-1].item()
        return losses[-1]

    step = CapturedStep(opt, noisy)
    with pytest.raises(RuntimeError, match="reads a value"):
        several(step)
    assert not step.captured
    assert int(opt.counters()["steps"]) == opt.steps.number == graph.WARM_UP


def test_a_capture_has_a_stream_of_its_own_and_stops_no_other_thread(monkeypatch):
    """Torch's own stream is one for all captures of a process, on the device of the first; and in
    its mode "global" a loader's thread that pins memory would end the capture."""
    asked = []

    @contextlib.contextmanager
    def capture(graph, stream=None, capture_error_mode="global"):
        asked.append((stream, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    streams = [SimpleNamespace(device=torch.device("cuda", i)) for i in range(2)]
    for stream in streams:
        assert graph.Graph(lambda: torch.ones(()), stream).result == 1
    assert asked == [(stream, "thread_local") for stream in streams]


def test_all_warm_up_steps_run_on_one_stream(monkeypatch):
    """A stream has memory and workspaces of its own: each new one would ask for them again."""
    made, any_stream = [], SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or any_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: any_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    model = mlp(5, 3)
    opt = KBFGS(model)
    step = CapturedStep(opt, lambda x: model(x).square().mean())
    for seed in range(3):
        step._on_the_side((rows(8, 5, seed=seed),))
    assert len(made) == 1


def test_nodes_of_autograd_are_made_anew_on_another_stream(monkeypatch):
    """One kept from an ordinary step would draw its stream into a capture."""
    stream = [1]
    monkeypatch.setattr(recorder, "current_stream", lambda device: stream[0])
    _, opt, step = made()
    for stream[0], kept in ((1, False), (1, True), (2, False), (2, True), (1, False)):
        step(*BATCHES[0])
        for layer in opt.layers:
            seen = layer.observer._accumulator(layer.bias).metadata
            assert bool(seen) is kept
            seen["here"] = True
