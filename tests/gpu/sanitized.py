"""What scripts/test_gpu.py runs under compute-sanitizer: small cases of every CUDA op, once each.

``python -m tests.gpu.sanitized``. Small, because a sanitizer slows kernels down a hundredfold.
"""

from __future__ import annotations

import torch

from tests.cuda_host.test_kernels import PAIRS
from tests.gpu.ongpu import run
from tests.helpers import cases


def main() -> None:
    chosen = [case for case in cases.ALL if "1024" not in case.id and "513" not in case.id]
    chosen += [
        cases.Case("curvature_update_", ":sizes", cases.curvature_update(PAIRS, "both")),
        cases.Case("kron_step_", ":sizes", cases.kron_step(PAIRS)),
    ]
    for case in chosen:
        if "compact" not in case.id:  # cuBLAS, not ours
            run(case.op, case.build(torch.float32), "cuda")
    torch.cuda.synchronize()
    print(f"{len(chosen)} cases ran", flush=True)


if __name__ == "__main__":
    main()
