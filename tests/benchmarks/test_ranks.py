"""A training run that torchrun starts on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Rank 0 alone writes, and the losses are those of one process, to float32's rounding."""
    losses = {}
    for size in (1, 2):
        path = tmp_path / f"{size}.json"
        start = [] if size == 1 else ["torch.distributed.run", "--nproc-per-node", "2", "-m"]
        options = ["--dataset", "curves", "--epochs", "1", "--threads", "1", "--json", path]
        options += ["--preset", "published", "--hessian-action", "minibatch"]
        ended = subprocess.run(
            [sys.executable, "-m", *start, "benchmarks.train", *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        losses[size] = [row["train_loss"] for row in json.loads(path.read_text())["rows"]]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2][-1] < losses[2][0]


def test_what_several_processes_cannot_do(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 4)
    with pytest.raises(ValueError, match="kfac runs in one process"):
        ranks.check("kfac", 1000, None)
    with pytest.raises(ValueError, match="batch_size 1001 is not a multiple of 4"):
        ranks.check("kbfgs", 1001, None)
    with pytest.raises(ValueError, match="max_seconds"):
        ranks.check("kbfgs", 1000, 3.0)
