"""python -m benchmarks.coverage: rows, what is missing, the table."""

import json

import pytest
import torch
from torch import nn

from benchmarks import coverage
from benchmarks.coverage import Network


def small(torch):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 10)
    )


def test_rows_and_what_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        coverage, "NETWORKS", [Network("small", "torch", small), Network("none", "no_such", small)]
    )
    path = tmp_path / "rows.jsonl"
    for _ in range(2):  # the second row takes the place of the first
        coverage.main(["--steps", "2", "--shared", "--json", str(path)])
    said = capsys.readouterr().out
    assert "none: left out, no_such is not installed" in said and "small: 99.7% of" in said
    (line,) = path.read_text().splitlines()
    row = json.loads(line)
    assert (row["layers"], row["parameters"], row["shared_machine"]) == (2, 2690, True)
    assert row["share"] == pytest.approx(2682 / 2690)
    assert row["factor_bytes"] == 4 * (28**2 + 4**2 + 129**2 + 128**2 + 10**2)
    assert list(row["not_covered"]) == ["BatchNorm2d is no kind of layer that is covered"]
    assert min(row[name + "_seconds"] for name in ("adamw", "first", "later")) > 0
    monkeypatch.setattr(coverage, "OUT", path)
    table = coverage.table()
    assert "| small | 0.0 M | 2 | 99.7% | 0 |" in table
    assert "Timed on a machine with other work on it" in table


def test_words_choose_networks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coverage, "NETWORKS", [Network("one", "no_such", small)])
    coverage.main(["--networks", "two", "--json", str(tmp_path / "rows.jsonl")])
    assert capsys.readouterr().out == ""


def test_every_network_has_a_batch_and_a_package():
    for network in coverage.NETWORKS:
        x, target = network.batch(torch.device("cpu"))
        assert len(x) == len(target) == network.size
        assert network.package in ("torchvision", "timm", "transformers")
