"""The comparison on physics-informed networks: its runs, rows, plot and table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import physics, report, summary, training
from benchmarks.equations import PROBLEMS, Poisson

SIZE = "--points 20 --width 5 --threads 1"


@pytest.fixture(autouse=True)
def threads():
    """The command sets torch's; a small network on few points wants one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(errors: list[float | None], **changes: object) -> dict:
    """A row with an evaluation a second, as far as plot and table read it."""
    row = {
        **{"problem": "burgers", "points": 20, "width": 5, "optimizer": "adam", "setting": "lr 1"},
        **{"seed": 0, "seconds": len(errors) - 1.0, "passes": None, "shared": False},
        **{"steps": 10, "closures": 20},
        **{"curve": [[float(i), 1.0, error] for i, error in enumerate(errors)]},
        **{"device": "a CPU", "device_type": "cpu", "threads": 2, "torch": "2", "commit": "abc"},
        **{"dirty": False, "final_error": errors[-1]},
    }
    return row | changes


# ------------------------------------------------------------------ runs


def test_the_command_writes_a_row_of_every_run_and_a_plot(tmp_path: Path) -> None:
    line = f"--seconds 0.3 --seeds 3 {SIZE} --out {tmp_path}"
    assert physics.main(line.split()) == 0
    rows = summary.read_rows(tmp_path / "physics.jsonl")
    runs = [(row["problem"], row["optimizer"]) for row in rows]
    assert runs == [(p, o) for p in PROBLEMS for o in ("kbfgs", "lbfgs", "adam")]
    for row in rows:
        assert {"commit", "dirty", "device", "driver", "torch", "threads"} <= set(row)
        assert (row["seed"], row["points"], row["width"], row["dtype"]) == (3, 20, 5, "float64")
        assert row["options"] == physics.GRIDS[row["optimizer"]][0]
        assert row["status"] == "complete" and row["steps"] >= 1
        seconds, _, errors = zip(*row["curve"], strict=True)
        assert seconds[-1] >= 0.3 > seconds[-2] and list(seconds) == sorted(seconds)
        assert min(errors[-2:]) <= row["final_error"] <= max(errors[-2:])
    kbfgs, lbfgs, adam = rows[:3]
    assert kbfgs["curve"][0] == lbfgs["curve"][0] == adam["curve"][0]  # one seed
    assert kbfgs["closures"] == 2 * kbfgs["steps"] and adam["closures"] == adam["steps"]
    assert kbfgs["counters"]["steps"] == kbfgs["steps"]
    assert (tmp_path / "physics" / "physics.png").read_bytes().startswith(b"\x89PNG")
    again = f"--problems poisson --optimizers adam --seconds 0.3 --seeds 3 {SIZE} --out {tmp_path}"
    assert physics.main(again.split()) == 0
    assert len(summary.read_rows(tmp_path / "physics.jsonl")) == len(rows)  # the same run, anew


@pytest.mark.parametrize(("duration", "steps"), [(1.0, 60), (7.0, 9)])
def test_seconds_are_those_of_steps_alone(
    monkeypatch: pytest.MonkeyPatch, duration: float, steps: int
) -> None:
    """By a clock that a step moves by ``duration`` and an evaluation by an hour."""
    clock = SimpleNamespace(now=0.0)

    class Steps(torch.optim.SGD):
        def step(self, closure):
            super().step(closure)
            clock.now += duration

    def error(self, u):
        clock.now += 3600
        return 1.0

    monkeypatch.setattr(physics, "build", lambda name, m, options: Steps(m.parameters(), lr=1e-3))
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(Poisson, "error", error)
    row = physics.run("poisson", "adam", {}, seed=0, seconds=60.0, points=10, width=3)
    assert row["steps"] == row["closures"] == steps
    assert [place[0] for place in row["curve"]] == [duration * k for k in range(steps + 1)]
    assert row["final_error"] == 1.0


def test_passes_are_a_budget_that_no_clock_changes() -> None:
    """A run of so many closures has the same curve whatever its seconds are."""
    rows = [
        physics.run("poisson", "kbfgs", physics.GRIDS["kbfgs"][0], 0, passes=20, points=9, width=3)
        for _ in range(2)
    ]
    assert rows[0]["curve"] == rows[1]["curve"]
    assert (rows[0]["closures"], rows[0]["steps"], rows[0]["seconds"]) == (20, 10, None)
    assert [place[0] for place in rows[0]["curve"]] == list(range(0, 21, 2))


def test_a_run_that_diverges_ends_and_says_so() -> None:
    row = physics.run("poisson", "adam", {"lr": 1e200}, 0, seconds=5.0, points=10, width=3)
    assert row["status"] == "diverged" and row["curve"][-1][0] < 5
    assert row["final_error"] is None and physics.final_error(row) == math.inf
    json.dumps(row, allow_nan=False)


def test_every_optimizer_has_as_many_settings_and_takes_them() -> None:
    assert set(physics.GRIDS) == set(physics.LOOKS)
    assert len({len(grid) for grid in physics.GRIDS.values()}) == 1
    for name, grid in physics.GRIDS.items():
        assert len({summary.point_text(options) for options in grid}) == len(grid)
        for options in grid:
            known = {key: value for key, value in options.items() if key != "cosine"}
            opt = physics.build(name, Poisson.network(3), known)
            assert opt.param_groups[0]["lr"] == options["lr"]


def test_flags_change_the_settings_of_kbfgs_alone() -> None:
    def settings(name: str, line: str) -> list[dict]:
        return physics.settings(name, physics.parser().parse_args(line.split()))

    assert settings("kbfgs", "") == [physics.GRIDS["kbfgs"][0]]
    assert settings("kbfgs", "")[0]["pair_decay"] == 0
    line = "--lr 0.1 --damping-a 0.2 --hessian-action ema --cosine"
    (changed,) = settings("kbfgs", line)
    assert changed == physics.GRIDS["kbfgs"][0] | {
        **{"lr": 0.1, "damping_a": 0.2, "hessian_action": "ema", "cosine": True}
    }
    assert settings("adam", line) == [physics.GRIDS["adam"][0]]
    assert settings("lbfgs", "--grid") == list(physics.GRIDS["lbfgs"])
    assert len(settings("kbfgs", "--grid --lr 1")) < len(physics.GRIDS["kbfgs"])  # each once


def test_the_learning_rate_falls_by_a_cosine() -> None:
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    rates = []
    for spent in (0.0, 0.5, 1.0, 1.1):
        physics.anneal(opt, [0.2], spent)
        rates.append(opt.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.1, 0.0, 0.0])


# ------------------------------------------------------------------ what rows say


def test_errors_are_log_linear_between_evaluations() -> None:
    row = made([1.0, 0.01, 0.01])
    assert physics.errors_at(row, [0, 0.5, 1.5]) == pytest.approx([1, 0.1, 0.01])
    assert np.isinf(physics.errors_at(made([1.0, 0.5, None]), [0, 1])).all()


def test_the_best_setting_is_that_of_the_lowest_median_over_all_seeds() -> None:
    rows = [made([1.0, e], setting="a", seed=i) for i, e in enumerate((0.1, 0.2, None))]
    rows += [made([1.0, e], setting="b", seed=i) for i, e in enumerate((0.3, 0.3, 0.01))]
    rows += [made([1.0, 0.001], setting="c")]  # of one seed
    rows += [made([1.0, 0.15], optimizer="kbfgs")]
    best = physics.best(rows)
    assert list(best) == ["kbfgs", "adam"]
    assert [row["setting"] for row in best["adam"]] == ["a"] * 3


def test_rows_of_another_size_budget_or_machine_are_not_compared() -> None:
    others = [{"points": 9}, {"width": 9}, {"seconds": 9.0}, {"threads": 9}, {"problem": "poisson"}]
    rows = [made([1.0, 0.1], **changes) for changes in others]
    rows += [made([1.0, 0.1]), made([1.0, 0.1], seed=1), *rows[-1:]]
    assert physics.comparable(rows, "burgers", "seconds") == rows[5:7]
    assert physics.comparable(rows, "burgers", "passes") == []
    by_passes = [made([1.0, 0.1], seconds=None, passes=n) for n in (1, 7, 7)]
    assert physics.comparable(by_passes + rows, "burgers", "passes") == by_passes[1:]
    assert physics.comparable([], "burgers", "seconds") == []


def test_plot_and_table_show_medians_and_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [made([1.0, e], seed=i) for i, e in enumerate((2e-3, 1e-3, 4e-3))]
    rows += [made([1.0, None], optimizer="lbfgs", setting="lr 2")]
    rows += [made([1.0, 3e-5], optimizer="kbfgs", problem="poisson")]
    rows += [made([1.0, 0.5], seconds=None, passes=1, shared=True, problem="poisson")]
    physics.plot(rows, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").stat().st_size > 10_000
    monkeypatch.setattr(report, "lines_of", {"physics": rows}.get)
    lines = report.physics().splitlines()
    tail = "1 | 3 | 1 seconds | 10 | 20 | 2.0e-03 | 1.0e-03 | 4.0e-03 |"
    assert lines[2].startswith("| Poisson, three frequencies | Adam | lr 1 | 1 | 1 | 1 passes |")
    assert lines[3].startswith("| Poisson, three frequencies | K-BFGS | lr 1 | 1 | 1 | 1 seconds |")
    assert lines[4] == f"| Burgers, viscosity 0.01/π | Adam | lr 1 | {tail}"
    assert "| L-BFGS | lr 2 |" in lines[5] and lines[5].count("inf") == 3
    assert [line.endswith(", beside other work.") for line in lines[7:10:2]] == [True, False]
    assert lines[-1].startswith("![Error against passes and seconds](../benchmarks/results/")
    monkeypatch.setattr(report, "lines_of", {"physics": []}.get)
    assert len(report.physics().splitlines()) == 2
