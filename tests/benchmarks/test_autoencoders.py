"""The defaults on the paper's autoencoders: runs, rows, and their table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import autoencoders, data
from benchmarks.summary import read_rows


def test_every_run_is_made_once_and_the_best_rate_is_shown(tmp_path: Path, monkeypatch) -> None:
    pixels = torch.rand(70, 784, generator=torch.Generator().manual_seed(0))
    noise = data.Dataset.of("mnist", "noise (70)", "a test", pixels[:50], pixels[50:])
    loaded: list[str] = []
    monkeypatch.setattr(data, "load", lambda name, *_, **__: loaded.append(name) or noise)
    monkeypatch.setitem(autoencoders.GRIDS, "muon", (1e-9, 0.02))
    out, before = tmp_path / "rows.jsonl", torch.get_num_threads()
    monkeypatch.setattr(autoencoders, "BATCH", 10)
    words = f"--datasets mnist --optimizers kbfgs muon --epochs 1 --out {out}".split()
    try:
        for _ in range(2):
            assert autoencoders.main(words) == 0
    finally:
        torch.set_num_threads(before)
    rows = read_rows(out)
    assert loaded == ["mnist"] and len(rows) == 3 + 2
    assert {row["seed"] for row in rows if row["optimizer"] == "kbfgs"} == {0, 1, 2}
    ends = {row["lr"]: autoencoders.final(row) for row in rows if row["optimizer"] == "muon"}
    assert ends[0.02] < ends[1e-9] == pytest.approx(rows[-1]["curve"][0][1], rel=1e-3)
    made = autoencoders.table(rows)
    assert "| Muon | 0.02 | 2 | 1 | 1 |" in made and "| the default | 1 | 3 | 1 |" in made
