"""Two builds of the extension side by side."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import binaries
from kbfgs_ext import environment
from tests.helpers import backends

pytestmark = backends.needs_native


def test_a_build_beside_itself(tmp_path: Path, monkeypatch, capsys) -> None:
    """Rows of every kernel and network asked for; afterwards the extension is as before."""
    monkeypatch.setattr(binaries, "LAYERS", (2,))
    monkeypatch.setattr(binaries, "WIDTHS", {"2 of 3": (3, 3, 3)})
    monkeypatch.setattr(binaries, "KERNELS", binaries.KERNELS[:2])
    native, path, out = environment.native, str(environment._binary()), tmp_path / "rows.jsonl"
    with backends.threads(1):
        binaries.main([path, path, "--seconds", "0.01", "--json", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("kernel", row.get("step")) for row in rows] == [
        binaries.KERNELS[0].name, binaries.KERNELS[1].name, "2 of 3",
    ]  # fmt: skip
    for row in rows:
        assert row["old_us"] > 0 and row["new_us"] > 0 and row["ratio"] > 0 and row["rounds"] >= 5
        assert row["kind"] == "binaries" and row["torch"]
    assert rows[0]["tensors"] > 2
    assert environment.native is native
    assert len(capsys.readouterr().out.splitlines()) == 3
