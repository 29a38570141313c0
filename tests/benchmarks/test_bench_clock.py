"""The clock of the microbenchmarks: turns, readings, peaks, and a GPU's with a stand-in for it."""

import functools
import gc
import time
import weakref

import pytest
import torch

from kbfgs_ext.bench import clock

CPU = torch.device("cpu")


def test_providers_take_turns():
    order = []
    meters = {name: functools.partial(lambda n: order.append(n) or 0.001, name) for name in "ab"}
    readings = clock.interleaved(meters, 0.0)
    assert order == list("ab") * clock.FEWEST_ROUNDS
    assert readings == {name: [0.001] * clock.FEWEST_ROUNDS for name in "ab"}


def test_a_reading_is_seconds_a_call():
    calls = []
    meter = clock.meters(lambda: calls.append(time.sleep(1e-4)), CPU)["any"]
    calls.clear()
    assert 1e-4 <= meter() < 1e-2
    assert 1 <= len(calls) <= 5


def test_peak_is_what_is_held_at_once():
    def call():
        first = torch.ones(1000)
        second = torch.ones(2000)
        del first
        return second, torch.ones(500)

    assert clock.peak_bytes(call, CPU) == 4 * 3000


def test_ceiling_is_a_rate(monkeypatch):
    monkeypatch.setattr(
        clock, "interleaved", lambda meters, _: {name: [2.0, 1.0] for name in meters}
    )
    monkeypatch.setattr(clock, "meters", lambda call, device: {"any": lambda: 1.0})
    assert clock.ceiling(CPU) == (2 * 4 * 2**26, 2 * 2048**3)


class FakeCuda:
    """Enough of torch.cuda to run the GPU's clock without one: time is the number of calls."""

    def __init__(self, capturable: bool) -> None:
        self.calls = self.flushed = 0
        self.capturable = capturable

    def call(self) -> None:
        self.calls += 1

    def patch(self, monkeypatch) -> None:
        fake = self

        class Stream:
            def wait_stream(self, other):
                pass

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.calls

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 0.02 * (end.at - self.at)  # ms

        class Graph:
            def replay(self):
                fake.calls += self.held

        class graph:
            def __init__(self, graph):
                self.graph = graph

            def __enter__(self):
                if not fake.capturable:
                    raise RuntimeError("not permitted when stream is capturing")
                self.before = fake.calls

            def __exit__(self, *_):
                self.graph.held, fake.calls = fake.calls - self.before, self.before

        class Flush:
            def zero_(self):
                fake.flushed += 1

        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph,
            "current_stream": Stream, "stream": lambda s: torch.no_grad(),
            "synchronize": lambda *_: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(clock, "_flush", Flush)


@pytest.mark.parametrize("capturable", [True, False], ids=["graph", "eager"])
def test_gpu_clock_reads_one_cold_call_and_many_warm_ones(monkeypatch, capturable):
    fake = FakeCuda(capturable)
    fake.patch(monkeypatch)
    meters = clock.meters(fake.call, torch.device("cuda"))
    for cache, calls in (("cold", 1), ("warm", 25)):  # 25 calls of 20 us fill the window
        before, flushed = fake.calls, fake.flushed
        assert meters[cache]() == pytest.approx(2e-5)
        assert fake.calls - before == calls
        assert fake.flushed - flushed == (cache == "cold")


def test_a_graph_keeps_what_it_reads_and_writes(monkeypatch):
    """The allocator may give their memory away, or back, as soon as no one has them."""
    fake = FakeCuda(True)
    fake.patch(monkeypatch)
    tensors = [torch.ones(3)]
    alive = weakref.ref(tensors[0])
    call = functools.partial(lambda given: fake.call(), tensors)
    meters = clock.meters(call, torch.device("cuda"))
    del tensors, call
    gc.collect()
    assert alive() is not None
    del meters
    gc.collect()
    assert alive() is None
