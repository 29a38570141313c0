"""The tables made from rows."""

import pytest

from benchmarks import report, stability
from benchmarks.step.clock import PHASES


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


def step_row(dataset, provider, **more):
    return {
        "dataset": dataset,
        "provider": provider,
        "batch_size": 4,
        "precision": "fp32",
        "rounds": 3,
        "ms": {"q20": 9.0, "q50": 12.34, "q80": 15.0},
        "ratio_to_eager": 0.5,
        "phases_ms": None,
        "commit": "0123456789abcdef",
        "dirty": False,
        "device": "a machine",
        "device_type": "cpu",
        "torch": "2.13",
        "threads": 2,
        **more,
    }


def test_every_model_and_machine_has_its_table_of_steps(monkeypatch):
    counted = {"counts": {"ops": 99.5, "launches": 7.0, "allocations": 100.0, "bytes": 3 * 2**20}}
    rows = [
        step_row("mnist", "AdamW"),  # of before there were counts
        step_row("mnist", "K-FAC", period=20, phases_ms={PHASES[0]: 1.234}, **counted),
        step_row("mlp", "Muon", period=1, **counted),
        step_row("mlp", "Muon", device="a GPU", device_type="cuda", **counted),
    ]
    monkeypatch.setattr(report, "lines_of", {"step": rows}.get)
    mnist, mlp, gpu = report.steps().split("\n| step |")
    assert "| AdamW | 12.3 | 9.00-15.0 | 0.50 |" + " – |" * 9 in mnist
    assert "| K-FAC | 12.3 | 9.00-15.0 | 0.50 | 1.23 |" in mnist
    assert "| 100 | 100 | 3.00 |" in mnist
    assert "3 interleaved rounds, MNIST autoencoder, batch 4, fp32; a machine, 2 th" in mnist
    assert mnist.endswith("Means over the steps of a period: K-FAC of 20.\n")
    assert " ops |" in mlp and "MLP of 4 layers 4096-4096, batch 4" in mlp
    assert mlp.endswith("commit 0123456789.\n")
    assert " launches |" in gpu and "| 7 | 100 | 3.00 |" in gpu
    front = report.step()
    assert "K-FAC" in front and "Muon" not in front
    assert "allocations" not in front and "9.00" not in front
