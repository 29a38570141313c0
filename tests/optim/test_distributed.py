"""Several processes: the same trajectory as one process on the whole batch, the same weights to the
bit on all ranks, and no rank that waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
OF_TWO = (
    "defaults", "paper", "convolutions", "parts_of_a_weight", "blocks", "ema", "published", "tuned",
    "ring_of_pairs", "steps_undone", "restarts", "without_bias", "norms_in_the_fallback",
    "accumulation", "clipping", "fewer_passes",
    "other_factors", "full_second_pass", "kinds_of_ddp", "other_loops", "narrow_dtypes",
    "weights_used_by_hand", "plain_model", "unequal_batches", "empty_batch",
    "layers_of_one_rank", "random_numbers_and_buffers", "synced_batch_norm",
    "shared_work", "memory_falls", "bytes_shared", "sharded", "sharded_methods", "sharded_kinds",
    "sharded_loops", "sharded_precision", "sharded_alike", "tools_of_torch", "loaded",
    "warm_start", "resume", "not_finite_on_one_rank", "a_rank_raises", "ranks_out_of_step",
    "optimizer_of_the_bare_model", "refusals", "bytes_sent", "last",
)  # fmt: skip
FIRST = ("saved",)  # what others load
OF_FOUR = (
    "defaults", "ema", "unequal_batches", "empty_batch", "warm_start", "resume",
    "shared_work", "memory_falls", "sharded", "sharded_hybrid", "loaded",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed"
)


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, str]]:
    """What each rank says of each case: four processes, two of which begin and end alone."""
    directory = tmp_path_factory.mktemp("ranks")
    plan = json.dumps([(2, FIRST), (4, OF_FOUR), (2, OF_TWO)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.optim.ranks", str(rank), directory, plan],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        output = [process.communicate(timeout=560)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    paths = [directory / f"{rank}.json" for rank in range(4)]
    return [
        {**(json.loads(path.read_text()) if path.exists() else {}), "output": text}
        for path, text in zip(paths, output, strict=True)
    ]


@pytest.mark.parametrize(
    ("size", "name"),
    [*((4, name) for name in OF_FOUR), *((2, name) for name in FIRST + OF_TWO)],
)
def test_processes(said, size, name):
    for rank in range(size - (name == "last")):  # in which the last rank ends
        wrong = said[rank].get(f"{size} {name}", f"has not come so far: {said[rank]['output']}")
        assert not wrong, f"rank {rank}: {wrong}"
