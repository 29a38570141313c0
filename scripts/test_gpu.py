"""Everything that needs a GPU, in one call: build, tests, sanitizers, benchmark rows.

``python scripts/test_gpu.py --out DIR``, from anywhere, leaves in DIR ``gpu.json`` (machine,
versions, commit, and per stage: state, seconds, counts), ``gpu.log`` (all output) and the rows of
the benchmarks. It ends within --minutes. A stage that would not fit is cut off, with all processes
that it started, and counts as failed; a benchmark that is cut off does not, its rows so far stay.
With --resume what passed before is not run again (same commit, same kind of device), with --only
nothing but the stages that are named. Exit status 0 means that all stages passed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED, CUT = "passed", "cut off"
GRACE = 5.0  # seconds from a stage's interrupt to its end


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    seconds: float  # at most, of the whole time
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    junit: Path | None = None
    prepares: bool = False  # for the stages behind it: run when resuming too
    measures: bool = False  # may be cut off, or find no time left


def stages(out: Path) -> list[Stage]:
    """In order of what is worth most if time runs out; without what measures nine minutes at most.

    The tests launch some 700 different Triton kernels, each compiled where it is first used: as
    many processes as there are cores share them (pytest-xdist). On 16 cores beside an H100 all
    tests took 134 s.
    """
    python = sys.executable
    cores = os.cpu_count() or 4
    workers = ["-n", str(min(cores, 14)), "--dist", "loadgroup"]
    if not importlib.util.find_spec("xdist"):
        workers = []

    def tests(name: str, seconds: float, *what: str) -> Stage:
        junit = out / f"{name}.xml"
        command = [python, "-m", "pytest", "-q", *workers, f"--junitxml={junit}", *what]
        # The references run on the CPU: threads of many processes would be in each other's way.
        return Stage(name, command, seconds, {"OMP_NUM_THREADS": "1"}, junit=junit)

    found = [
        Stage(
            "build",
            [python, "setup.py", "-q", "build_ext", "--inplace"],
            120,
            {"TORCH_CUDA_ARCH_LIST": _architecture(), "MAX_JOBS": str(cores)},
            prepares=True,
        ),
        tests("steps", 150, "tests/gpu", "--ignore=tests/gpu/test_ops.py"),
        tests("ops", 180, "tests/gpu/test_ops.py"),
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
    rows = str(out / "step.jsonl"), str(out / "micro.jsonl")
    step = [python, "-m", "benchmarks.step", "--rounds", "20", "--json", rows[0]]
    micro = [python, "-m", "kbfgs_ext.bench", "--seconds", "0.2", "--json", rows[1]]
    found.append(Stage("step", step, 90, measures=True))
    found.append(Stage("bench", micro, 600, measures=True))  # it writes its rows case by case
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
    if stage.junit is not None:
        stage.junit.unlink(missing_ok=True)  # of an earlier run
    log.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n")
    log.flush()
    if limit <= 0:
        return {"state": f"{CUT}: no time left", "seconds": 0.0}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env={**environment, **stage.environment},
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        state = PASSED if process.wait(limit) == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        state = f"{CUT} after {limit:.0f} s"
        os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):  # a group of its own: compilers, workers, all
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result: dict[str, object] = {"state": state, "seconds": round(time.monotonic() - start, 1)}
    if stage.junit is not None and stage.junit.exists():
        found = counts(stage.junit)
        result |= found
        if found["skipped"] == found["tests"]:  # no GPU after all
            result["state"] = "failed (every test was skipped)"
    return result


def earlier(out: Path, here: dict[str, object]) -> dict[str, dict[str, object]]:
    """The stages that an earlier call has passed, on the same commit and kind of device."""
    try:
        before = json.loads((out / "gpu.json").read_text())
    except (OSError, ValueError):
        return {}
    if before["machine"] != here or here["dirty"]:
        return {}
    return {name: got for name, got in before["stages"].items() if got["state"] == PASSED}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.log")
    parser.add_argument("--minutes", type=float, default=9, help="time for everything (9)")
    parser.add_argument("--resume", action="store_true", help="leave out what has passed before")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    out = options.out.resolve()
    wanted = stages(out)
    if unknown := set(options.only or ()) - {stage.name for stage in wanted}:
        parser.error(f"--only: no stage is called {', '.join(sorted(unknown))}")
    out.mkdir(parents=True, exist_ok=True)

    here = machine()
    before = earlier(out, here) if options.resume else {}
    outcomes: dict[str, dict[str, object]] = {}
    good = True
    with open(out / "gpu.log", "a" if before else "w") as log:
        for stage in wanted:
            if options.only and stage.name not in options.only:
                continue
            again = stage.prepares or stage.name not in before
            outcome = run(stage, deadline, log) if again else before[stage.name]
            outcomes[stage.name] = outcome
            results = {"machine": here, "stages": {**before, **outcomes}}
            (out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
            state = str(outcome["state"])
            print(f"{stage.name:10} {state}, {outcome['seconds']} s", flush=True)
            good &= state == PASSED or (stage.measures and state.startswith(CUT))
    print("all passed" if good else f"not all passed: see {out / 'gpu.log'}")
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage is ended with it
    raise SystemExit(main())
