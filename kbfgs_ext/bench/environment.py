"""What a benchmark row says about the machine and the code it was made with."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Commit, dirty flag, device, driver, versions, CPU and threads, all ready for JSON.

    What does not apply is None: the driver without a GPU, the commit outside a git checkout. Files
    under ``benchmarks/results`` do not make a checkout dirty, since every run writes there.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    checkout = (ROOT / "setup.py").exists()  # else installed, perhaps inside somebody's repository
    changes = commit = None
    if checkout:
        changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
        commit = _output("git", "rev-parse", "--verify", "HEAD")
    return {
        "commit": commit,
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


def state(device: torch.device) -> dict[str, Any]:
    """What holds a measurement back: clock in MHz, why a GPU's is held back (bits of
    nvidia-smi's ``clocks_event_reasons.active``), the CPU's load; and the last cache's bytes."""
    found: dict[str, Any] = {"clock_mhz": None, "held_back": None, "cache_bytes": None}
    found["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["cache_bytes"] = about.L2_cache_size
        query = "--query-gpu=clocks.sm,clocks_event_reasons.active"
        said = _output(
            "nvidia-smi", f"--id=GPU-{about.uuid}", query, "--format=csv,noheader,nounits"
        )
        if said and said.count(",") == 1:
            clock, found["held_back"] = (word.strip() for word in said.split(","))
            found["clock_mhz"] = float(clock) if clock.isdigit() else None
        return found
    found["cache_bytes"] = _last_cache()
    clocks = re.findall(r"^cpu MHz\s*: ([0-9.]+)", _text(Path("/proc/cpuinfo")), flags=re.M)
    if clocks:
        found["clock_mhz"] = sum(map(float, clocks)) / len(clocks)
    return found


@functools.cache
def _last_cache() -> int | None:
    sizes = (_text(folder / "size").strip() for folder in CACHES.glob("index*"))
    known = [re.fullmatch(r"(\d+)([KM])", size) for size in sizes]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[1]) * units[size[2]] for size in known if size), default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not Linux
        return ""


@functools.cache
def cpu_model() -> str:
    """The processor's name."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
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
