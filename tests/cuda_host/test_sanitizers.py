"""The kernels' memory accesses: AddressSanitizer and UndefinedBehaviorSanitizer over every case."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_host import build

ROOT = Path(__file__).parents[2]


def runtime() -> str | None:
    """Path of g++'s AddressSanitizer runtime, or None."""
    if build.compiler() is None:
        return None
    path = subprocess.run(
        [build.compiler(), "-print-file-name=libasan.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return path if os.path.isabs(path) else None


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python's own exit leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(runtime() is None, reason="needs g++ with libasan: a Linux machine with gcc")
def test_no_access_out_of_bounds_and_nothing_undefined():
    build.library("asan")
    done = run_python("-m", "tests.cuda_host.sanitized")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "cases clean" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(runtime() is None, reason="needs g++ with libasan: a Linux machine with gcc")
def test_the_sanitizer_would_see_it():
    """The same set-up finds a vector whose memory is one element short of its size."""
    build.library("asan")
    code = (
        "import torch; from tests.cuda_host import build; m = build.load('asan')\n"
        "s, v = torch.ones(33), torch.ones(33); v.untyped_storage().resize_(32 * 4)\n"
        "lists = dict(s=[s], y=[v], h_change=[s], g_bar=[s], g_bar_next=[s])\n"
        "m.pair_ema_cuda(lists | dict(decay=0.5, ok=None))\n"
    )
    done = run_python("-c", code)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
