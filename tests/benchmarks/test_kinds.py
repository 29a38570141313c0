"""Launches and bytes by the kind of layer: the committed rows are what is counted."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step import kinds, prediction
from kbfgs_ext.bench.measure import load

ROWS = {row["layer"]: row for row in load(kinds.OUT)}


def test_every_kind_has_its_row():
    assert list(ROWS) == [kind.title for kind in kinds.KINDS]


@pytest.mark.parametrize("at", [1, 3])
def test_rows_are_what_is_counted(at):
    kind = kinds.KINDS[at]
    found, row = kinds.row(kind), ROWS[kind.title]
    assert found == {name: row[name] for name in found}


def test_groups_and_blocks_are_one_call():
    """Torch's kernels and Triton's do not grow with them; CUDA's are one for every 64."""
    conv, grouped = ROWS["Conv2d, 128 to 128, 3 x 3"], ROWS["the same in 32 groups"]
    assert all(b - a <= 8 for a, b in zip(conv["triton"], grouped["triton"], strict=True))
    whole, blocks = ROWS["Linear, 1024 to 1024, factors whole"], ROWS["the same in blocks of 256"]
    assert whole["triton"] == blocks["triton"]
    assert blocks["factor_bytes"] < whole["factor_bytes"] / 3


@pytest.mark.parametrize("groups", [1, 2])
def test_products_of_a_convolution(groups):
    """Forward, and in the backward one for the input's gradient and one for the weight's."""
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    with FakeTensorMode(allow_non_fake_inputs=True), prediction.Trace() as trace:
        conv(torch.ones(2, 4, 5, 5, requires_grad=True)).sum().backward()
    flops = 2 * (2 * 6 * 5 * 5) * (4 // groups * 9)
    by_name = {k.name: k.flops for k in trace.kernels}
    assert by_name["convolution"] == flops
    assert by_name["convolution_backward"] == 2 * flops


def test_rows_take_the_place_of_older_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", kinds.KINDS[:1])
    for _ in range(2):
        kinds.main(["--json", str(tmp_path / "kinds.jsonl")])
    assert [row["layer"] for row in load(tmp_path / "kinds.jsonl")] == [kinds.KINDS[0].title]
