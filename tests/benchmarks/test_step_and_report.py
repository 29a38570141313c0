"""The step benchmark and the tables made from rows."""

import json

import pytest

from benchmarks import report, stability, step


def test_step_rows_hold_what_a_row_must(tmp_path, capsys):
    path = tmp_path / "step.jsonl"
    step.main(["--dataset", "curves", "--batch-size", "8", "--rounds", "2", "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(step.PROVIDERS)
    for row in rows:
        assert {"commit", "dirty", "device", "torch", "threads", "dtype", "seed"} <= set(row)
        assert 0 < row["ms"]["q20"] <= row["ms"]["q50"] <= row["ms"]["q80"]
        assert (row["phases_ms"] is not None) == ("K-BFGS" in row["provider"])
        if row["phases_ms"]:  # the parts are disjoint and none is missed
            assert set(row["phases_ms"]) == set(step.PHASES)
            assert all(row["phases_ms"][p] > 0 for p in step.PHASES)
    assert rows[0]["ratio_to_eager"] == 1.0
    assert step.EAGER in capsys.readouterr().out


def test_seeds_are_parsed():
    assert stability._numbers("0-3,7") == [0, 1, 2, 3, 7]


def test_tables_are_rendered_between_their_marks(monkeypatch):
    monkeypatch.setitem(report.TABLES, "fake", lambda: "| a |\n| --- |\n| 1 |\n")
    text = "before\n<!-- rows: fake -->\nold\n<!-- end -->\nafter\n"
    new = report.render(text)
    assert new == "before\n<!-- rows: fake -->\n| a |\n| --- |\n| 1 |\n<!-- end -->\nafter\n"
    assert report.render(new) == new


@pytest.mark.parametrize("name", list(report.TABLES))
def test_committed_rows_make_the_committed_tables(name):
    """No hand-typed number: README and docs hold what the rows say."""
    assert report.TABLES[name]().startswith("| ")
    assert report.main(["--check"]) == 0
