"""The comparison by steps on many tasks: its runs, its rows, and what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.optimizers import MuonWithAdamW
from benchmarks.summary import point_text, read_rows
from benchmarks.tasks import __main__ as command
from benchmarks.tasks import blocks, optimizers, runs, seconds, sides, transfer
from kbfgs_ext.bench.measure import store


@pytest.fixture(autouse=True)
def threads():
    """The command sets torch's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


STEP_SECONDS = {"adamw": 0.001, "muon": 0.002, "kbfgs": 0.004}
LARGE = ("autoencoder", "characters-128")  # make test-all


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] if n in LARGE else []) for n in runs.TASKS],
)
def test_a_task_is_the_same_again_and_its_steps_reach_something(name: str) -> None:
    row, again = (runs.run(name, "kbfgs", {}, seed=3, steps=4) for _ in range(2))
    strip = [[place[:3] for place in one["curve"]] for one in (row, again)]
    assert strip[0] == strip[1]
    assert row["status"] == "complete" and row["curve"][0][0] == 0 and row["curve"][-1][0] == 4
    assert row["curve"][-1][1] != row["curve"][0][1]
    assert {"commit", "dirty", "device", "torch", "threads", "counters"} <= set(row)


@pytest.mark.parametrize("name", optimizers.GRIDS)
def test_every_optimizer_moves_every_parameter(name: str) -> None:
    task = runs.TASKS["convolutions"](0)
    if (reason := optimizers.missing(name, type(task))) is not None:
        pytest.skip(reason)
    opt = optimizers.build(name, task, optimizers.GRIDS[name][0])
    before = [p.detach().clone() for p in task.model.parameters()]
    batches = task.batches()
    for _ in range(2):
        opt.step(runs.closure_of(opt, next(batches)))
    for old, new in zip(before, task.model.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_muon_takes_linear_layers_and_convolutions_and_reaches_their_weights() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 2))
    muon = MuonWithAdamW(model, lr=0.1)
    assert [tuple(m.shape) for m in muon.matrices] == [(3, 18), (2, 12)]
    taken = muon.matrices[0].data_ptr()
    assert taken == model[0].weight.data_ptr()


def test_grids_are_of_one_size_but_for_the_setting_that_is_the_same_everywhere() -> None:
    sizes = {name: len(grid) for name, grid in optimizers.GRIDS.items()}
    ours = sizes.pop("kbfgs"), sizes.pop("shorter")
    assert (*ours, sizes.pop("kfac")) == (1, 1, 10) and set(sizes.values()) == {5}
    assert set(optimizers.LABELS) == set(optimizers.GRIDS)


def test_the_command_makes_every_run_once_and_the_best_setting_with_all_seeds(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    line = f"--tasks regression --optimizers adamw kbfgs --seeds 0 1 --out {path}"
    assert command.main(line.split()) == 0
    rows = read_rows(path)
    adamw = [row for row in rows if row["optimizer"] == "adamw"]
    first = [row for row in adamw if row["seed"] == 0]
    assert [row["setting"] for row in first] == [point_text(p) for p in optimizers.GRIDS["adamw"]]
    chosen = runs.best(runs.of(rows, "regression", "adamw"))
    assert [row["seed"] for row in chosen] == [0, 1]
    assert runs.final(chosen[0]) == min(map(runs.final, first))
    assert len(rows) == 5 + 1 + 2
    stamp = path.read_text()
    assert command.main(line.split()) == 0
    assert path.read_text() == stamp


def test_a_run_that_diverged_has_reached_nothing() -> None:
    row = {"status": "diverged", "curve": [[0, 1.0, 1.0, 0.0], [3, None, None, 0.1]]}
    assert runs.final(row) == math.inf


def test_by_seconds_the_steps_fit_into_the_other_s_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(seconds, "step_seconds", lambda task, points: STEP_SECONDS)
    rows = tmp_path / "rows.jsonl"
    line = f"--tasks regression --optimizers adamw muon --seeds 0 --steps 4 --out {rows}"
    assert command.main(line.split()) == 0
    whole = [row | {"steps": runs.TASKS["regression"].steps} for row in read_rows(rows)]
    store(rows, whole, runs.IDENTITY)
    out = tmp_path / "seconds.jsonl"
    line = f"--tasks regression --seeds 0 1 --rows {rows} --out {out}"
    assert seconds.main(line.split()) == 0
    made = read_rows(out)
    assert [(row["rival"], row["seed"], row["steps"]) for row in made] == [
        ("adamw", 0, 75), ("adamw", 1, 75), ("muon", 0, 150), ("muon", 1, 150),
    ]  # fmt: skip
    assert all(row["step_seconds"] == STEP_SECONDS["kbfgs"] for row in made)


def test_a_step_of_everyone_is_timed_by_the_processor() -> None:
    found = seconds.step_seconds("regression", {"adamw": {"lr": 1e-3}, "kbfgs": {}})
    assert list(found) == ["adamw", "kbfgs"] and all(0 < s < 1 for s in found.values())


def test_sizes_of_blocks_are_runs_of_the_same_task(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for _ in range(2):
        blocks.main(f"--tasks regression --seeds 0 --steps 3 --out {path}".split())
    assert [row["point"]["block_size"] for row in read_rows(path)] == list(blocks.SIZES)


def test_directions_with_other_sides_factors_are_runs_of_the_same_task(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for _ in range(2):
        sides.main(f"--tasks regression --seeds 0 --steps 20 --out {path}".split())
    rows = read_rows(path)
    assert [row["sides"] for row in rows] == list(sides.SIDES)
    ends = {row["curve"][-1][1] for row in rows}
    ends.add(runs.run("regression", "kbfgs", {}, 0, 20)["curve"][-1][1])
    assert len(ends) == len(rows) + 1, "another direction each"


def test_transfer_makes_every_run_once_and_tables_of_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "WIDTHS", (16, 32))
    monkeypatch.setattr(transfer, "RATES", (0.02, 0.05))
    monkeypatch.setattr(transfer, "SCALED", ("characters",))
    out = tmp_path / "rows.jsonl"
    for _ in range(2):
        transfer.main(["--seeds", "1", "--steps", "2", "--out", str(out)])
    rows = read_rows(out)
    assert len(rows) == 5 + 2 * 2
    kept = {row["input_scale"]: row["curve"][0][1] for row in rows if not row["point"]}
    assert len(set(kept.values())) == 3, "the network sees what is multiplied"
    monkeypatch.setattr(transfer, "lines_of", lambda name: rows)
    assert transfer.scales().count("transformer") == 2
    assert transfer.widths().count("**") == 2 * 2
