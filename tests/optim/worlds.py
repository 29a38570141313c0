"""Starts the processes of ranks.py, and looks at what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
Plan = list[tuple[int, Sequence[str]]]  # numbers of processes, and the cases that they run
LIMIT = 900  # seconds for all of them: a machine that does much else is slow at waiting, too
marks = [
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed"
    ),
    pytest.mark.timeout(LIMIT),
]


def cases_of(plan: Plan) -> list[tuple[int, str]]:
    """Every case with its number of processes."""
    return [(size, name) for size, names in plan for name in names]


def run(
    plan: Plan, directory: Path, backend: str = "gloo", device: str = "cpu"
) -> list[dict[str, str]]:
    """What each rank says of each case."""
    ranks = range(max(size for size, _ in plan))
    what = [str(directory), json.dumps(plan), backend, device]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.optim.ranks", str(rank), *what],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]
    try:
        output = [process.communicate(timeout=LIMIT - 20)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    paths = [directory / f"{rank}.json" for rank in ranks]
    return [
        {**(json.loads(path.read_text()) if path.exists() else {}), "output": text}
        for path, text in zip(paths, output, strict=True)
    ]


def check(said: list[dict[str, str]], size: int, name: str) -> None:
    """No rank has anything to say of the case."""
    for rank in range(size - (name == "last")):  # in which the last rank ends
        wrong = said[rank].get(f"{size} {name}", f"has not come so far: {said[rank]['output']}")
        assert not wrong, f"rank {rank}: {wrong}"
