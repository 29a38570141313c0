"""Two builds of the extension in turns: ``python -m benchmarks.binaries OLD.so NEW.so``.

Every kernel on layers so small that the call is what takes the time, and whole steps of small and
middling networks. The builds take turns round by round, and a ratio is the median of the rounds'
own. Both run in one process, under the torch and the Python that both can be loaded by.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import statistics
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kbfgs_ext import KBFGS, environment
from kbfgs_ext.bench.cases import KERNELS
from kbfgs_ext.bench.clock import Meter, interleaved, meters
from kbfgs_ext.bench.environment import environment as machine
from kbfgs_ext.bench.kernel import Kernel, Layer, Numbers

Row = dict[str, Any]
Builds = dict[str, types.ModuleType]  # "old" and "new"
CPU = torch.device("cpu")
LAYERS = (1, 9, 70)
SIDE = 4  # of a layer whose call is timed
WIDTHS = {"8 of 16": (16,) * 9, "100 of 8": (8,) * 101, "3 of 256": (128, 256, 256, 64)}
ROWS = 64


class Few(Numbers):
    """As many rows as columns."""

    batch = SIDE


def load(path: Path) -> types.ModuleType:
    """The extension in this file."""
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compared(clocks: dict[str, Meter], seconds: float) -> Row:
    """Microseconds of both builds at the 20 % quantile, and new to old."""
    readings = interleaved(clocks, seconds)
    ratios = [new / old for old, new in zip(readings["old"], readings["new"], strict=True)]
    low = {name: statistics.quantiles(taken, n=5)[0] * 1e6 for name, taken in readings.items()}
    return {f"{name}_us": low[name] for name in ("old", "new")} | {
        "ratio": statistics.median(ratios),
        "rounds": len(ratios),
    }


def call(builds: Builds, kernel: Kernel, layers: int, seconds: float) -> Row:
    """A kernel's call on this many layers."""
    clocks: dict[str, Meter] = {}
    for name, build in builds.items():
        args = kernel.build((Layer(SIDE, SIDE),) * layers, Few(CPU))
        run = functools.partial(getattr(build, f"{kernel.op}cpu"), args)
        clocks[name] = meters(run, CPU)["any"]
    tensors = sum(len(a) for a in args.values() if isinstance(a, list))
    shape = {"kernel": kernel.name, "layers": layers, "tensors": tensors}
    return shape | compared(clocks, seconds)


def step(builds: Builds, network: str, seconds: float) -> Row:
    """A step of the defaults, closure included."""
    clocks: dict[str, Meter] = {}
    for name, build in builds.items():
        run = _stepper(build, WIDTHS[network])
        run()  # starts the factors
        clocks[name] = meters(run, CPU)["any"]
    return {"step": network, "rows_of_batch": ROWS} | compared(clocks, seconds)


def _stepper(build: types.ModuleType, widths: tuple[int, ...]) -> Callable[[], object]:
    torch.manual_seed(0)
    pairs = itertools.pairwise(widths)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairs))
    X, target = torch.randn(ROWS, widths[0]), torch.rand(ROWS, widths[-1])
    opt = KBFGS(model)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        return loss

    def run() -> None:
        environment.native = lambda: build  # what an op asks for in every call
        opt.step(closure)

    return run


def measured(builds: Builds, seconds: float) -> Iterator[Row]:
    """All rows."""
    for kernel, layers in itertools.product(KERNELS, LAYERS):
        yield call(builds, kernel, layers, seconds)
    before = environment.native
    try:
        for network in WIDTHS:
            yield step(builds, network, 20 * seconds)
    finally:
        environment.native = before


def main(arguments: list[str] | None = None) -> None:
    """Print a line per row; with --json write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a call (1)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    builds = {"old": load(options.old), "new": load(options.new)}
    rows, where = [], {"builds": [options.old.name, options.new.name]} | machine()
    for row in measured(builds, options.seconds):
        what = f"{row.get('kernel', 'step')}, {row.get('layers', row.get('step'))} layers"
        print(f"{what:40} {row['old_us']:10.2f} {row['new_us']:10.2f} us {row['ratio']:6.2f}")
        rows.append({"kind": "binaries"} | row | where)
    if options.json is not None:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
