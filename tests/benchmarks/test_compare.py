"""The comparison of optimizers: its grids, its book of runs, what it says about them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import compare, data, grids, optimizers, plots, report, summary
from benchmarks.compare import Book, Plan
from benchmarks.data import DataError, Dataset
from benchmarks.models import AUTOENCODERS, Autoencoder, cross_entropy
from benchmarks.optimizers import NAMES, Settings
from benchmarks.summary import Spread
from kbfgs_ext import presets

PLAN = Plan(
    datasets=("mnist",),
    optimizers=("kbfgs", "adamw"),
    points=2,
    seeds=(1, 2),
    budget=0.02,
    tune_budget=0.01,
    batch_size=16,
)
RUNS = 2 * (2 + 2)  # optimizers * (points + seeds)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs train a narrow autoencoder of the same depth, which takes a fraction of a second."""
    monkeypatch.setitem(AUTOENCODERS, "mnist", Autoencoder((784, 20, 15, 10, 5), cross_entropy))


@pytest.fixture(scope="module")
def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(50, 784, generator=generator)
    return Dataset.of("mnist", "noise (50)", "a test", pixels[:35], pixels[35:])


def run(plan: Plan, path: Path, images: Dataset) -> Book:
    book = Book(path)
    compare.compare(plan, book, lambda name: images, Console(quiet=True))
    return book


def curve(losses: list[float | None], **changes: object) -> dict:
    """A row with an epoch a second, as far as the summary reads it."""
    places = list(map(float, range(len(losses))))
    row = {
        **{"kind": "compare", "stage": "final", "dataset": "mnist", "data": "Noise (1,000)"},
        **{"train": 1000, "optimizer": "adamw", "point": {"lr": 0.003}, "seed": 1},
        **{"budget": places[-1], "batch_size": 10, "status": "complete", "seconds": places},
        **{"epochs": places, "train_loss": losses, "test_loss": losses, "device_type": "cpu"},
        **{"device": "a CPU", "threads": 2, "commit": "abc", "dirty": False, "torch": "2"},
    }
    return row | changes


# ------------------------------------------------------------------ grids


def test_grids_have_one_size_and_cover_every_optimizer() -> None:
    assert set(grids.GRIDS) == set(NAMES)
    assert {len(grid) for grid in grids.GRIDS.values()} == {grids.SIZE}
    assert set(grids.TARGETS) == set(data.NAMES)
    for name, grid in grids.GRIDS.items():
        points = [json.dumps(point.given(), sort_keys=True) for point in grid]
        assert len(set(points)) == grids.SIZE
        for point in grid:
            optimizers.settle(name, point)  # raises for a setting that it does not have


# ------------------------------------------------------------------ runs


def test_every_run_is_made_once(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compare.jsonl"
    rows = run(PLAN, path, images).rows
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == RUNS
    assert len({compare.identity(row) for row in rows}) == RUNS
    assert [row["stage"] for row in rows] == ["tune"] * 4 + ["final"] * 4
    assert [row["seed"] for row in rows] == [0] * 4 + [1, 1, 2, 2]
    for row in rows:
        assert {"commit", "dirty", "device", "driver", "torch", "cuda", "triton"} <= set(row)
        assert row["settings"]["lr"] == row["point"].get("lr", presets.TUNED["lr"])
        assert row["seconds"][-1] >= row["budget"] > row["seconds"][-2]  # the epoch is finished
    for name in PLAN.optimizers:
        tuned = [r for r in rows if r["stage"] == "tune" and r["optimizer"] == name]
        best = min(tuned, key=summary.loss_at_budget)["point"]
        assert {json.dumps(r["point"]) for r in rows[4:] if r["optimizer"] == name} == {
            json.dumps(best)
        }
    monkeypatch.setattr(compare, "train", lambda *args: pytest.fail("a run was made again"))
    assert run(PLAN, path, images).rows == rows


def test_a_killed_comparison_goes_on(images: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "compare.jsonl"
    run(PLAN, path, images)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:50])  # killed while it wrote
    rows = run(PLAN, path, images).rows
    assert len(rows) == RUNS
    assert path.read_text().startswith("".join(lines[:3]))
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]


def test_more_seconds_are_another_run(images: Dataset, tmp_path: Path) -> None:
    plan = Plan(**{**vars(PLAN), "points": 1, "seeds": (1,)})
    path = tmp_path / "compare.jsonl"
    assert [row["stage"] for row in run(plan, path, images).rows] == ["final"] * 2  # no choice
    longer = Plan(**{**vars(plan), "budget": 0.03})
    book = run(longer, path, images)
    assert [row["budget"] for row in book.rows] == [0.02, 0.02, 0.03, 0.03]
    (group,) = summary.groups(book.rows)
    assert {row["budget"] for rows in group.finals.values() for row in rows} == {0.03}


def test_what_is_missing_is_left_out_with_the_reason(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)

    def load(name: str) -> Dataset:
        if name == "faces":
            raise DataError("no faces here")
        return images

    changes = {"datasets": ("faces", "mnist"), "optimizers": ("soap", "adamw"), "points": 1}
    book = Book(tmp_path / "compare.jsonl")
    console = Console(record=True, quiet=False, file=(tmp_path / "log").open("w"), width=200)
    compare.compare(Plan(**{**vars(PLAN), **changes}), book, load, console)
    text = console.export_text()
    assert "soap is left out: SOAP needs heavyball (pip install heavyball)" in text
    assert "faces is left out: no faces here" in text
    assert {row["optimizer"] for row in book.rows} == {"adamw"}


def test_the_command_writes_rows_figure_and_table(
    images: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(data, "load", lambda *args, **options: images)
    line = "--quick --datasets mnist --optimizers adamw sgdm --budget 0.01 --batch-size 16"
    assert compare.main([*line.split(), "--out", str(tmp_path)]) == 0
    assert len((tmp_path / "compare.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "compare" / "noise-50-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "| optimizer | settings | s to 120 |" in capsys.readouterr().out


def test_quick_is_a_preset_under_what_is_given() -> None:
    def plan(line: str) -> Plan:
        return compare.plan_of(compare.parser().parse_args(line.split()))

    quick = plan("--quick")
    assert (quick.points, quick.seeds, quick.datasets) == (1, (1,), data.NAMES)
    assert quick.runs * quick.budget < 120  # seconds
    assert plan("--quick --budget 7 --seeds 4 5").budget == 7
    assert plan("--budget 7").tune_budget == 7
    assert plan("--budget 7 --tune-budget 3").tune_budget == 3
    assert plan("").points == grids.SIZE


# ------------------------------------------------------------------ summary


def test_losses_are_crossed_between_evaluations() -> None:
    row = curve([400.0, 200.0, 50.0, 80.0])
    assert summary.crossing(row, 500, "seconds") == 0
    assert summary.crossing(row, 200, "seconds") == pytest.approx(1)
    assert summary.crossing(row, 100, "epochs") == pytest.approx(1.5)  # halves: log-linear
    assert summary.crossing(row, 49, "epochs") == math.inf
    assert summary.crossing(row | {"status": "diverged"}, 100, "epochs") == math.inf
    assert summary.loss_at_budget(row | {"budget": 1.5}) == pytest.approx(100)


def test_a_diverged_run_has_no_loss() -> None:
    row = curve([400.0, 200.0, None], status="diverged")
    assert summary.loss_at_budget(row | {"budget": 1.0}) == math.inf


def test_spreads_for_people() -> None:
    assert Spread.of([3.0, 1.0, 20.0]).text() == "3.00 (1.00–20.0)"
    assert Spread.of([100.2, 100.3]).text() == "100"
    assert Spread.of([5.0, math.inf, 4.0]).text() == "5.00 (4.00–∞)"
    assert Spread.of([math.inf, math.inf]).text() == "–"


def test_reports_keep_to_the_tuned_point_of_todays_grid() -> None:
    good, bad, gone = ({"lr": lr} for lr in (0.002, 0.003, 123.0))
    rows = [
        curve([9.0, 3.0], stage="tune", seed=0, point=good),
        curve([9.0, 4.0], stage="tune", seed=0, point=bad),
        curve([9.0, 1.0], stage="tune", seed=0, point=gone),
        curve([9.0, 3.5], point=good),
        curve([9.0, 3.6], point=good, seed=2),
        curve([9.0, 4.5], point=bad),
        curve([9.0, 2.0], point=gone),
        curve([9.0, 2.0], data="other", optimizer="muon"),
        curve([9.0, 1.0], data="tuned only", stage="tune"),
    ]
    first, second = summary.groups(rows)
    assert [row["train_loss"][1] for row in first.finals["adamw"]] == [3.5, 3.6]
    assert (first.name, second.name) == ("noise-1000-cpu", "other-cpu")
    assert "median (smallest–largest) of 2 seeds, tuned with seed 0 over 2 points each" in (
        first.conditions
    )
    assert "untuned" in second.conditions


def test_tables_rank_by_the_loss_at_the_end() -> None:
    rows = [
        curve([543.0, 100.0, 70.0]),
        curve([543.0, 90.0, 59.0], optimizer="muon"),
        curve([543.0, None], optimizer="sgdm", status="diverged", budget=2.0),
    ]
    lines = report.comparison(rows, "figures").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| Muon", "| AdamW", "| SGD, momentum"]
    assert set(lines[4].split(" | ")[2:]) == {"–", "– |"}
    assert "figures/noise-1000-cpu.png" in lines[-1]


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_show_every_optimizer(tmp_path: Path, seeds: int) -> None:
    rows = []
    for i, name in enumerate(NAMES):
        for seed in range(seeds):
            point = grids.GRIDS[name][0].given()
            losses: list[float | None] = [543.0, 100.0 + i + seed, 60.0 + i]
            rows.append(curve(losses, optimizer=name, seed=seed, point=point))
    diverged = {"status": "diverged", "budget": 2.0, "point": grids.GRIDS["sgdm"][0].given()}
    rows += [curve([543.0, None], optimizer="sgdm", seed=9, **diverged)] * (seeds + 1)
    path = tmp_path / "new" / "figure.png"
    plots.comparison(summary.groups(rows)[0], path)
    assert path.stat().st_size > 20_000


def test_a_point_is_a_setting_that_its_optimizer_has() -> None:
    assert summary.point_text(Settings(lr=0.2, damping_a=0.1).given()) == "lr 0.2, damping_a 0.1"
