"""Everything that needs a GPU, in one call: build, tests, sanitizers, benchmark rows.

``python scripts/test_gpu.py --out DIR``, from anywhere, leaves in DIR ``gpu.json`` (machine,
versions, commit, and per stage: state, seconds, counts), ``gpu.log`` (all output) and the rows of
the benchmarks. It ends within --minutes: a stage that would not fit is cut off and counts as
failed. Exit status 0 means that all stages passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    seconds: int  # at most, of the whole time
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    junit: Path | None = None


def stages(out: Path) -> list[Stage]:
    """In order of what is worth most if time runs out. Seconds add up to less than 9 minutes."""
    python = sys.executable
    found = [
        Stage(
            "build",
            [python, "setup.py", "-q", "build_ext", "--inplace"],
            120,
            {"TORCH_CUDA_ARCH_LIST": _architecture(), "MAX_JOBS": str(os.cpu_count() or 4)},
        ),
        Stage(
            "tests",
            [python, "-m", "pytest", "tests/gpu", "-q", f"--junitxml={out / 'junit.xml'}"],
            200,
            junit=out / "junit.xml",
        ),
    ]
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            found.append(
                Stage(
                    tool,
                    [
                        "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
                        "--kernel-name-exclude", "regex=gemm|cublas|elementwise|cutlass",
                        python, "-m", "tests.gpu.sanitized",
                    ],
                    40,
                    # The allocator's caching would hide an access past a tensor's end.
                    {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                )
            )  # fmt: skip
    rows = str(out / "micro.jsonl"), str(out / "step.jsonl")
    found += [
        Stage(
            "bench", [python, "-m", "benchmarks.micro", "--seconds", "0.2", "--json", rows[0]], 90
        ),
        Stage("step", [python, "-m", "benchmarks.step", "--rounds", "20", "--json", rows[1]], 45),
    ]
    return found


def _architecture() -> str:
    import torch

    if not torch.cuda.is_available():
        return "9.0"
    return "{}.{}".format(*torch.cuda.get_device_capability())


def machine() -> dict[str, object]:
    """What the results were obtained on."""
    import torch

    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() or None

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    cuda = torch.cuda.is_available()
    return {
        "commit": output("git", "rev-parse", "HEAD"),
        "dirty": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name() if cuda else None,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "compute_sanitizer": shutil.which("compute-sanitizer"),
    }


def counts(junit: Path) -> dict[str, int]:
    """Tests, failures, errors and skips of a pytest run."""
    suite = next(ElementTree.parse(junit).getroot().iter("testsuite"))
    return {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}


def run(stage: Stage, deadline: float, log) -> dict[str, object]:
    """One stage, cut off at its own limit and at the deadline of all."""
    start = time.monotonic()
    limit = min(stage.seconds, deadline - start)
    log.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n")
    log.flush()
    if limit <= 0:
        return {"state": "no time left", "seconds": 0.0}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env={**environment, **stage.environment},
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        state = "passed" if process.wait(limit) == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        state = f"cut off after {limit:.0f} s"
    result: dict[str, object] = {"state": state, "seconds": round(time.monotonic() - start, 1)}
    if stage.junit is not None and stage.junit.exists():
        found = counts(stage.junit)
        result |= found
        if found["skipped"] == found["tests"]:  # no GPU after all
            result["state"] = "failed (every test was skipped)"
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.log")
    parser.add_argument("--minutes", type=float, default=9, help="time for everything (9)")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes

    results: dict[str, object] = {"machine": machine(), "stages": {}}
    with open(out / "gpu.log", "w") as log:
        for stage in stages(out):
            outcome = run(stage, deadline, log)
            results["stages"][stage.name] = outcome
            (out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
            print(f"{stage.name:10} {outcome['state']}, {outcome['seconds']} s", flush=True)
    passed = all(outcome["state"] == "passed" for outcome in results["stages"].values())
    print("all passed" if passed else f"not all passed: see {out / 'gpu.log'}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
