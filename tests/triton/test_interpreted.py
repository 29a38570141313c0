"""Runs tests/triton/interpreted in processes of their own, whose Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

FOLDER = Path(__file__).parent / "interpreted"
# One process per file, so that workers share them; the longest first, and in two.
HALF = "curvature_update_ or finite"
LONGEST = "test_cases.py"
PARTS = [(LONGEST, HALF), (LONGEST, f"not ({HALF})")]
PARTS += [(path.name, None) for path in sorted(FOLDER.glob("test_*.py")) if path.name != LONGEST]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("file", "keyword"), PARTS, ids=lambda part: part and str(part))
def test_interpreted(file, keyword):
    chosen = [] if keyword is None else ["-k", keyword]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header",
         "-W", "ignore::RuntimeWarning", *chosen, FOLDER / file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
