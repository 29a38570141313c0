"""Single kernels under pytest-benchmark: ``pytest benchmarks/test_kernels.py --benchmark-only``.

For a look at one kernel with that tool's statistics and its ``--benchmark-compare``. Providers take
turns and rows are written only by ``python -m kbfgs_ext.bench``.
"""

import pytest
import torch

from kbfgs_ext.bench.cases import Case, cases, providers
from kbfgs_ext.bench.cost import cost
from kbfgs_ext.bench.gate import Gate, copies
from kbfgs_ext.ops import registry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = [
    pytest.param(case, name, id="-".join((*case.key, name)).replace(" ", "_"))
    for case in cases()
    for name in providers(case, DEVICE)
]


@pytest.mark.parametrize(("case", "provider"), ALL)
def test_kernel(benchmark, case: Case, provider: str):
    op, args = case.kernel.op, case.build(DEVICE)
    run, mine = providers(case, DEVICE)[provider], copies(args)
    try:
        run(mine)
    except registry.Unsupported as reason:
        pytest.skip(str(reason))
    assert Gate(op, args).verdict(mine) is None

    def call() -> None:
        run(mine)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = " ".join(case.key)
    benchmark.extra_info |= cost(op, args)._asdict() | {"provider": provider}
    benchmark(call)
