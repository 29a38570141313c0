"""Clocks: seconds a call, providers in turns; the machine's ceilings; memory at its peak.

On the CPU a reading is perf_counter around enough calls to fill a window. On a GPU it is a pair of
CUDA events: "warm" around a graph of many calls, "cold" around one call after a memset that is
larger than any L2. What a graph cannot capture is launched eagerly.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch

Call = Callable[[], object]
Meter = Callable[[], float]  # seconds a call
Key = TypeVar("Key", bound=Hashable)

WINDOW = 5e-4  # seconds of one reading: far above the clock's own cost
MOST_CALLS = 100  # in one reading
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60
FLUSH_BYTES = 256 * 2**20
MEMORY = "[memory]"  # the profiler's event for what its allocators give and take back
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines on stderr


class Ceiling(NamedTuple):
    """What this machine does at best."""

    bytes_per_second: float  # of a large copy, read and write counted
    flops_per_second: float  # of a large float32 matrix product


def meters(call: Call, device: torch.device) -> dict[str, Meter]:
    """How to read the clock for ``call``, by the state of the cache ("any" on a CPU)."""
    if device.type == "cuda":
        return _gpu_meters(call)
    call()
    count = _count(_seconds(call))
    return {"any": lambda: _seconds(_repeated(call, count)) / count}


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _count(seconds: float) -> int:
    """Calls in one reading."""
    return min(MOST_CALLS, math.ceil(WINDOW / max(seconds, 1e-9)))


def _repeated(call: Call, count: int) -> Call:
    def calls() -> None:
        for _ in range(count):
            call()

    return calls


def _gpu_meters(call: Call) -> dict[str, Meter]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture wants its allocations and handles to exist
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    once = _captured(call)
    _event_seconds(once)
    count = _count(_event_seconds(once))
    many = _captured(_repeated(call, count))
    _event_seconds(many)

    def cold() -> float:
        _flush().zero_()  # also keeps the GPU busy while the CPU queues what is timed
        return _event_seconds(once)

    return {"cold": cold, "warm": lambda: _event_seconds(many) / count}


def _captured(call: Call) -> Call:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # not capturable
        torch.cuda.synchronize()
        return call
    return functools.partial(_replay, graph, call)


def _replay(graph: Any, call: Call) -> None:
    """Replay what was captured of ``call``, whose tensors live as long as this: the graph reads and
    writes them, and does not hold them."""
    graph.replay()


def _event_seconds(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def interleaved(meters: dict[Key, Meter], seconds: float) -> dict[Key, list[float]]:
    """Readings of all meters, one each a round, for about ``seconds``."""
    readings: dict[Key, list[float]] = {key: [] for key in meters}

    def one_round() -> None:
        for key, meter in meters.items():
            readings[key].append(meter())

    a_round = _seconds(one_round)
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / a_round)))
    for _ in range(rounds - 1):
        one_round()
    return readings


def ceiling(device: torch.device, seconds: float = 2.0) -> Ceiling:
    """The best copy and the best matrix product of some rounds."""
    on_gpu = device.type == "cuda"
    source = torch.ones(2**28 if on_gpu else 2**26, device=device)
    target = torch.empty_like(source)
    n = 8192 if on_gpu else 2048
    A, B = torch.randn(2, n, n, device=device)
    C = torch.empty_like(A)
    best: dict[str, float] = {}
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(A, B, out=C)}
    for name, call in calls.items():
        cache = "cold" if on_gpu else "any"
        readings = interleaved({name: meters(call, device)[cache]}, seconds / 2)
        best[name] = min(readings[name])
    return Ceiling(2 * source.numel() * source.element_size() / best["copy"],
                   2 * n**3 / best["product"])  # fmt: skip


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory that a call holds beyond its arguments, as torch's allocator sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    for event in recorded(call, device):
        if event.name() == MEMORY:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def recorded(call: Call, device: torch.device) -> list[Any]:
    """The profiler's events of ``call``, those of memory included."""
    activities = {torch.profiler.ProfilerActivity.CPU}
    if device.type == "cuda":
        activities.add(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profile.profiler.kineto_results.events()
