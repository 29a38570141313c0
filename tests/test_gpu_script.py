"""scripts/test_gpu.py with stages that need no GPU: limits, process groups, resuming."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JUNIT = '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="{}"/></testsuites>'


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "scripts" / "test_gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "machine", lambda: {"commit": "c", "dirty": False})
    return module


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """main() on these stages: its exit status, and {stage: state} as gpu.json has it."""

    def run(*stages, options=()):
        monkeypatch.setattr(script, "stages", lambda out: list(stages))
        status = script.main(["--out", str(tmp_path), *options])
        found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
        return status, {name: outcome["state"] for name, outcome in found.items()}

    return run


def shell(script, name, code, seconds=20.0, **options):
    return script.Stage(name, ["sh", "-c", code], seconds, **options)


def ends(pid: int) -> bool:
    """Whether the process is gone, or dead and not yet reaped, soon."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc")
def test_a_stage_that_is_cut_off_leaves_nothing_running(script, run, tmp_path):
    code = f"sleep 60 & echo $! > {tmp_path}/child; wait"
    status, states = run(
        shell(script, "slow", code, 0.5),
        shell(script, "next", "exit 0"),
        shell(script, "bad", "exit 3"),
    )
    assert status == 1
    assert states == {"slow": "cut off after 0 s", "next": "passed", "bad": "failed (3)"}
    assert ends(int((tmp_path / "child").read_text()))


def test_a_benchmark_may_be_cut_off_but_not_fail(script, run):
    short = ["--minutes", "0.02"]  # 1.2 s
    slow = shell(script, "bench", "sleep 60", measures=True)
    late = shell(script, "late", "exit 0", measures=True)
    assert run(shell(script, "a", "exit 0"), slow, late, options=short)[0] == 0
    assert run(slow, shell(script, "a test", "exit 0"), options=short)[0] == 1
    assert run(shell(script, "bench", "exit 1", measures=True))[0] == 1


def test_resuming_leaves_out_what_has_passed(script, run, tmp_path):
    def stages(fails):
        note = f"echo {{}} >> {tmp_path}/ran; exit {{}}"
        return (
            shell(script, "build", note.format("build", 0), prepares=True),
            shell(script, "one", note.format("one", 0)),
            shell(script, "two", note.format("two", fails)),
        )

    assert run(*stages(fails=1))[0] == 1
    status, states = run(*stages(fails=0), options=["--resume"])
    assert status == 0 and set(states.values()) == {"passed"}
    assert (tmp_path / "ran").read_text().split() == ["build", "one", "two", "build", "two"]
    script.machine = lambda: {"commit": "d", "dirty": False}
    run(*stages(fails=0), options=["--resume"])
    assert (tmp_path / "ran").read_text().split()[5:] == ["build", "one", "two"]


def test_counts_come_from_this_run_alone(script, run, tmp_path):
    junit = tmp_path / "t.xml"
    stage = shell(script, "t", f"echo '{JUNIT.format(3)}' > {junit}", junit=junit)
    assert run(stage)[1] == {"t": "failed (every test was skipped)"}
    assert run(shell(script, "t", "exit 2", junit=junit))[1] == {"t": "failed (2)"}


def test_what_must_run_fits_and_every_test_is_in_a_stage(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.shutil, "which", lambda name: name)
    stages = script.stages(tmp_path)
    assert sum(stage.seconds for stage in stages if not stage.measures) <= 9 * 60
    assert [stage.measures for stage in stages] == sorted(stage.measures for stage in stages)
    assert {stage.name for stage in stages} >= {"build", "steps", "ops"}
