"""Compiles ahead, on all cores, the Triton kernels that tests/gpu/test_ops.py launches.

``python -m tests.gpu.compiled``. The calls are those of the tests, on the GPU too, since a kernel
is compiled for its arguments' alignment; but nothing is launched. Triton keeps what it has made on
disk, where the tests find it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator

import torch

from kbfgs_ext.ops.registry import Unsupported
from tests.cuda_host.test_kernels import MORE
from tests.gpu import ongpu
from tests.helpers import cases, half_cases

PLAIN = [*cases.ALL, *MORE]
CASES = {
    torch.float64: PLAIN,
    torch.float32: [*PLAIN, *half_cases.variants(PLAIN)],
}


def parts() -> Iterator[tuple[str, torch.dtype]]:
    """What processes share out, longest first: they would rarely make the same kernel twice."""
    counts = {
        (case.op, dtype): sum(other.op == case.op for other in found)
        for dtype, found in CASES.items()
        for case in found
    }
    yield from sorted(counts, key=counts.__getitem__, reverse=True)


def compile_part(op: str, dtype: torch.dtype) -> int:
    """Compile what the op's cases launch at ``dtype``; how many launches that is."""
    from kbfgs_ext.ops.triton_common import COMPILER
    from tests.triton import recorder

    launches = 0

    def warm(kernel, programs, *args, device, **options) -> None:
        nonlocal launches
        if programs:
            launches += 1
            kernel.warmup(*args, grid=(programs,), **COMPILER, **options)

    with recorder.replaced(warm):
        for case in CASES[dtype]:
            if case.op == op:
                try:
                    ongpu.run(op, case.build(dtype), "triton")
                except Unsupported:
                    continue  # the tests see to it that it may be
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.compiled", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 4)
    jobs = parser.parse_args().jobs
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        made = list(pool.map(compile_part, *zip(*parts(), strict=True)))
    print(f"{sum(made)} launches of {sum(map(len, CASES.values()))} cases are compiled", flush=True)


if __name__ == "__main__":
    main()
