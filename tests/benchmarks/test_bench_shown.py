"""What the microbenchmarks print, draw and compare."""

import json
import math
import subprocess
import sys

import pytest
import torch

from kbfgs_ext.bench import __main__ as bench
from kbfgs_ext.bench import environment, show, verdict
from kbfgs_ext.bench.cases import APART, BLAS, COMPILED, EAGER
from tests.benchmarks.test_bench import fake_row

CPU = torch.device("cpu")


def times(low, middle, high):
    return {"q20": low, "q50": middle, "q80": high}


def row(provider="cpu", us=(9.0, 10.0, 11.0), ratio=0.5, **changes):
    return fake_row(provider, ratio, us=us and times(*us), bytes=2**20, **changes)


# ------------------------------------------------------------------ headlines


ROWS = [
    row(EAGER, (40, 50, 60)),
    row(BLAS, (20, 25, 30)),
    row(COMPILED, None, note="skipped: no"),
    row("cpu", (9, 10, 11)),
    row("cpu" + APART, (7, 8, 9)),
    row(EAGER, (4, 5, 6), shape="square 64"),
    row("cpu", (9, 10, 11), shape="square 64"),
    row("cuda", None, shape="square 128", note="wrong: P[0]"),
]


def test_a_headline_is_against_the_fastest_alternative():
    found = [(o["provider"], a["provider"], a["us"]["q50"]) for o, a in show.headlines(ROWS)]
    assert found == [("cpu", BLAS, 25), ("cpu", EAGER, 5)]


def test_a_headline_is_of_a_warm_cache():
    rows = [row(EAGER, (1, 2, 3), cache="cold"), row("cuda", (1, 1, 1), cache="cold")]
    rows += [row(EAGER, (4, 4, 4), cache="warm"), row("cuda", (2, 2, 2), cache="warm")]
    ((ours, other),) = show.headlines(rows)
    assert (ours["cache"], other["cache"]) == ("warm", "warm")


def test_the_plot_names_every_kernel(tmp_path):
    path = tmp_path / "folder" / "plot.svg"
    show.plot(ROWS, path)
    drawn = path.read_text()
    assert "momentum_, square 32" in drawn and "momentum_, square 64" in drawn
    assert "2.50, BLAS" in drawn and "0.50, eager" in drawn


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"share_of_ceiling": 0.9, "cache_bytes": 2**25}, ""),
        ({"share_of_ceiling": 1.5, "cache_bytes": 2**25}, "(from a cache: 1.0 of 32 MiB)"),
        ({"share_of_ceiling": 1.5, "cache_bytes": 2**19}, "(partly from a cache)"),
        ({"share_of_ceiling": 1.5}, "(partly from a cache)"),
        ({"share_of_ceiling": 1.5, "cache_bytes": 2**25, "cache": "cold"}, ""),
        ({"share_of_ceiling": 1.5, "cache_bytes": 2**25, "bound": "compute"}, ""),
    ],
)
def test_a_rate_above_the_memorys_is_explained(changes, note):
    assert show.from_cache(row(**changes)).strip() == note
    assert note in show.line(row(**changes))


# ------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("us", "ratio", "word"),
    [
        ((4, 5, 6), 0.25, verdict.FASTER),
        ((14, 15, 16), 0.75, verdict.SLOWER),
        ((9.9, 10, 10.1), 0.5, verdict.ALIKE),
        ((8, 10, 12), 0.5, verdict.UNDECIDED),
        ((10, 11, 12), 0.55, verdict.UNDECIDED),
        ((14, 15, 16), 0.5, verdict.UNDECIDED),  # the eager reference has slowed alike
        ((4, 5, 6), 0.5, verdict.UNDECIDED),
    ],
)
def test_a_verdict_needs_ranges_apart_and_the_ratio_to_agree(us, ratio, word):
    (found,) = verdict.verdicts([row(us=(9.8, 10, 10.2))], [row(us=us, ratio=ratio)])
    assert found.word == word
    assert found.growth == pytest.approx(us[1] / 10)


def test_on_another_machine_times_alone_count():
    (found,) = verdict.verdicts([row()], [row(us=(4, 5, 6), device="another")])
    assert found.word == verdict.FASTER


def test_only_kernels_of_ours_with_both_times_are_compared():
    assert not list(verdict.verdicts(ROWS[:3], ROWS[:3]))
    assert not list(verdict.verdicts([row()], [row(precision="bf16")]))
    assert not list(verdict.verdicts([row(us=None)], [row()]))


@pytest.mark.parametrize(
    ("us", "status", "words"),
    [((14, 15, 16), 1, "1 kernels: 1 slower"), ((4, 5, 6), 0, "1 kernels: 1 faster")],
)
def test_two_files_are_compared(tmp_path, capsys, us, status, words):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(json.dumps(row(ratio=0.5)) + "\n")
    new.write_text(json.dumps(row(us=us, ratio=0.05 * us[1])) + "\n")
    assert bench.main(["--compare", str(old), str(new)]) == status
    assert words in capsys.readouterr().out


def test_files_with_nothing_in_common_or_missing(tmp_path, capsys):
    old = tmp_path / "old.jsonl"
    old.write_text(json.dumps(row()) + "\n")
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps(row(shape="square 64")) + "\n")
    assert bench.main(["--compare", str(old), str(new)]) == 2
    assert "no kernel of ours has a time in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--compare", str(old), str(tmp_path / "none.jsonl")])
    assert "no such file" in capsys.readouterr().err


# ------------------------------------------------------------------ the machine


def test_the_state_of_a_cpu():
    found = environment.state(CPU)
    assert set(found) == {"clock_mhz", "held_back", "cache_bytes", "load"}
    for value in found.values():
        assert value is None or math.isfinite(value)
    if environment.CACHES.exists():
        assert found["cache_bytes"] >= 2**18


def test_an_installed_package_names_no_commit_of_the_folder_it_is_in(monkeypatch, tmp_path):
    """It may be installed inside somebody's repository."""
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    found = environment.environment()
    assert found["commit"] is None and found["dirty"] is None


def test_without_rich_it_says_what_to_install(tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError('No module named rich')")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import runpy;"
         " runpy.run_module('kbfgs_ext.bench', run_name='__main__')"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "pip install 'kbfgs_ext[bench]'" in done.stderr
