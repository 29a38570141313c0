"""Run by test_sanitizers.py in a process of its own under AddressSanitizer and UBSan.

``python -m tests.cuda_host.sanitized``: every case in float32, with 16-bit numbers beside it
and, of the curvature update, on a machine where the rows fit on chip only in part. A finding ends
the process.
"""

from __future__ import annotations

import os

import torch

from kbfgs_ext import environment
from tests.cuda_host import build
from tests.cuda_host.oncpu import run
from tests.cuda_host.test_kernels import MORE
from tests.helpers import cases, half_cases


def main() -> None:
    module = build.load("asan")
    environment.native = lambda: module
    torch.set_num_threads(1)
    count = 0
    narrow = half_cases.variants([*cases.ALL, *MORE])
    for case in [*cases.ALL, *MORE, *narrow]:
        module.set_machine(2, 200 * 1024, False)
        run(case.op, case.build(torch.float32))
        count += 1
        if case.op == "curvature_update_" and case not in narrow:
            module.set_machine(2, 8 * 1024, True)
            run(case.op, case.build(torch.float64))
    print(f"{count} cases clean", flush=True)
    os._exit(0)  # torch's own teardown is not under test


if __name__ == "__main__":
    main()
