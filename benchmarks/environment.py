"""What a benchmark row says about the machine and the code it was made with."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Commit, dirty flag, device, driver, versions, CPU and threads, all ready for JSON.

    What does not apply is None: the driver without a GPU, the commit outside a git checkout. Files
    under ``benchmarks/results`` do not make a checkout dirty, since every run writes there.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "commit": _output("git", "rev-parse", "--verify", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_model(),
        "device_type": device.type,
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "kbfgs_ext": _version("kbfgs_ext"),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What ``command`` prints when run in the repository, or None where it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
