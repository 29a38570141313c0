"""Runs tests/triton/interpreted in a process of its own, whose Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interpreted():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header",
         "-W", "ignore::RuntimeWarning", FOLDER],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
