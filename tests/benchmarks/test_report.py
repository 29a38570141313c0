"""The tables made from rows."""

import pytest

from benchmarks import report, stability


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
