"""The whole-step benchmark on a GPU: every backend, eager and captured."""

from __future__ import annotations

import pytest

from benchmarks.step import measure
from benchmarks.step.providers import GRAPH, chosen, providers
from tests.helpers.steps import CUDA, MLP

pytestmark = pytest.mark.gpu


def test_everyone_is_measured_and_a_graph_is_launched_at_once(monkeypatch):
    monkeypatch.setattr(measure, "MODELS", {"mlp": MLP})
    able, left_out = chosen(providers(CUDA), (), MLP, CUDA)
    assert set(left_out) <= {"SOAP"}  # heavyball may be missing, a backend may not
    rows = {row["provider"]: row for row in measure.measure("mlp", able, CUDA)}
    assert list(rows) == [provider.name for provider in able]
    for name, row in rows.items():
        assert row["loss"] is not None and row["ms"]["q50"] > 0
        counts, captured = row["counts"], name.endswith(GRAPH)
        assert (row["phases_ms"] is None) == captured
        if captured:
            plain = rows[name.removesuffix(GRAPH)]["counts"]
            assert 0 < counts["launches"] < plain["launches"]
            assert counts["allocations"] == 0
        else:
            assert min(counts.values()) > 0
