"""What the whole-step benchmark reads: phases, counts, and captured steps with a stand-in graph."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.step import captured, clock, counts, measure
from benchmarks.step.clock import PhaseClock
from benchmarks.step.providers import GRAPH, Provider
from kbfgs_ext import KBFGS, CapturedStep, ops
from kbfgs_ext.bench.clock import MEMORY
from kbfgs_ext.optim import graph
from tests.helpers.steps import BY_NAME, CPU, CUDA, MLP, Ticking, runner
from tests.helpers.tape import Tape

# ------------------------------------------------------------------ the clock


def test_time_belongs_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "time", Ticking())
    phases = PhaseClock(CPU)
    inner = phases.timed(lambda: None, "statistics")

    def fails() -> None:
        inner()
        raise RuntimeError("in vain")

    def step() -> None:
        phases.timed(lambda: (inner(), inner()), "first pass")()
        with pytest.raises(RuntimeError, match="in vain"):
            phases.timed(fails, "curvature")()

    wanted = {"first pass": 3, "statistics": 3, "curvature": 2, "other": 3}
    assert phases.seconds(step) == wanted
    assert phases.seconds(step) == wanted


def test_on_a_gpu_only_the_ends_of_a_step_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    phases = PhaseClock(CUDA)
    seconds = phases.seconds(phases.timed(lambda: log.append("work"), "direction"))
    assert log == ["wait", "event", "event", "work", "event", "event", "wait"]
    assert seconds == {"other": 2e-3, "direction": 2e-3}


# ------------------------------------------------------------------ counts


def test_what_computes_is_counted() -> None:
    x, weight = torch.rand(6, 4), torch.rand(5, 4, requires_grad=True)

    def forward() -> None:  # one product; the transposition is a view
        with torch.no_grad():
            F.linear(x, weight)

    def backward() -> None:  # product, sum; ones, a product
        torch.autograd.grad(F.linear(x, weight).sum(), weight)

    def idle() -> None:
        torch.empty(3).view(3)

    found = [counts.counts(call, 1, CPU) for call in (forward, backward, idle)]
    assert [f["ops"] for f in found] == [1, 4, 0]
    assert found[0] == {"ops": 1, "allocations": 1, "bytes": 4 * 6 * 5}
    assert found[2] == {"ops": 0, "allocations": 1, "bytes": 4 * 3}


def test_ours_count_with_what_they_call() -> None:
    """One op where a kernel does it all; the reference is what it is made of."""

    def call(backend: str) -> float:
        M, dW, W = (torch.rand(3, 4) for _ in range(3))
        none = [torch.empty(0)]
        step = lambda: ops.momentum_([M], [dW], none, [W], none, 0.9, 0.0, None, backend)  # noqa: E731
        return counts.counts(step, 1, CPU)["ops"]

    assert call("cpu") == 1
    assert call("reference") > 3


def test_counts_are_means_over_a_period() -> None:
    steps = iter(range(100))
    found = counts.counts(lambda: torch.empty(1 + next(steps) % 4).zero_(), 4, CPU)
    assert found == {"ops": 1, "allocations": 1, "bytes": 4 * 2.5}


def test_a_gpus_launches_are_its_drivers_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, kind: str = "CPU", size: int = 0) -> SimpleNamespace:
        return SimpleNamespace(
            name=lambda: name,
            nbytes=lambda: size,
            device_type=lambda: SimpleNamespace(name=kind),
        )

    calls = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cudaLaunchCooperativeKernel",
             "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync",
             "cudaMemsetAsync"]  # fmt: skip
    others = ["cudaEventRecord", "cudaStreamIsCapturing", "cudaDeviceSynchronize", "aten::mm",
              "cutlass_gemm", "Memcpy HtoD (Pageable -> Device)"]  # fmt: skip
    events = [event(name) for name in calls + others]
    events += [event(MEMORY, "CUDA", size) for size in (512, 1024, -512)]
    events += [event(MEMORY, "CPU", 8)]
    monkeypatch.setattr(counts, "recorded", lambda call, device: events)
    found = counts.counts(lambda: None, 2, CUDA)
    assert found == {"ops": 0, "launches": len(calls) / 2, "allocations": 1, "bytes": 768}


# ------------------------------------------------------------------ captured steps


class CountedGraph(Tape):
    """A stand-in for a graph that says how often it was replayed."""

    replays = 0

    def replay(self) -> None:
        super().replay()
        type(self).replays += 1


@pytest.fixture
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedGraph, "replays", 0)
    monkeypatch.setattr(graph, "Graph", CountedGraph)
    monkeypatch.setattr(KBFGS, "device", CUDA)
    monkeypatch.setattr(CapturedStep, "_on_the_side", CapturedStep._ordinary)
    on_the_side = captured.OrdinaryCapture._step
    monkeypatch.setattr(captured.OrdinaryCapture, "_on_the_side", on_the_side)


@pytest.mark.parametrize("name", ["K-BFGS, minibatch", "AdamW, fused", "SGD, fused"])
def test_captured_steps_are_the_ordinary_ones(name: str, as_if_cuda: None) -> None:
    provider = BY_NAME[name]
    graphed = runner(Provider(name + GRAPH, provider.make, captured=True))
    plain = runner(provider)
    while len(plain.steps) < len(graphed.steps):  # a captured one warms up for longer
        plain.step()
    for _ in range(3):
        plain.step()
        graphed.step()
        assert graphed.loss.item() == plain.loss.item()
    assert CountedGraph.replays == len(graphed.steps) - graph.WARM_UP
    assert measure.figures(graphed, plain)["phases_ms"] is None


def test_a_replay_takes_the_batch_as_it_is(as_if_cuda: None) -> None:
    torch.manual_seed(0)
    network = MLP.build()
    x = MLP.batch(8)
    opt = torch.optim.SGD(network.parameters(), lr=0.0)
    step = captured.captured(opt, lambda x: MLP.loss(network(x), x))
    for _ in range(captured.BEFORE_REPLAYS):
        before = step(x).item()
    x.zero_()
    assert step(x).item() == pytest.approx(MLP.loss(network(x), x).item())
    assert step(x).item() != before
    assert step(MLP.batch(8)).item() == before
