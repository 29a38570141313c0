"""The layer table: found again by content, bounded, and right for layers without programs."""

import weakref

import pytest
import torch
import triton.language as tl

from kbfgs_ext.ops import triton_common
from tests.helpers import calls, cases

CPU = torch.device("cpu")


def test_second_call_uploads_nothing(monkeypatch):
    args = cases.of("curvature_update_")[0].build(torch.float32)
    tables = triton_common.Tables()
    uploads = []
    upload = tables._upload
    monkeypatch.setattr(tables, "_upload", lambda *a: uploads.append(a) or upload(*a))
    monkeypatch.setattr("kbfgs_ext.ops.bfgs_update.triton.TABLES", tables)
    for _ in range(3):
        calls.call("curvature_update_", args, "triton")
    assert len(uploads) == 1


def test_number_of_tables_is_bounded():
    tables = triton_common.Tables()
    for i in range(triton_common.CACHED_TABLES + 10):
        tables.get(CPU, [[i, 1]], [1])
    assert len(tables._tables) == triton_common.CACHED_TABLES
    newest = tables.get(CPU, [[triton_common.CACHED_TABLES + 9, 1]], [1])
    assert newest.rows.tolist() == [triton_common.CACHED_TABLES + 9, 1]


def test_starts_are_padded_to_a_power_of_two():
    table = triton_common.Tables().get(CPU, [[5], [6], [7]], [2, 0, 4], [1, 1, 1])
    assert table.entries == 4
    assert table.programs == (6, 3)
    assert table.starts[0].tolist() == [0, 2, 2, triton_common.NEVER]
    assert table.starts[1].tolist() == [0, 1, 2, triton_common.NEVER]


@pytest.mark.parametrize("op", ["curvature_update_", "output_change_", "pair_ema_"])
def test_a_program_finds_its_row_among_many(op, monkeypatch):
    """By a search, and layers without programs are passed over."""
    for case in cases.of(op)[:4]:
        found = []
        for many in (triton_common.MANY, tl.constexpr(1)):
            monkeypatch.setattr(triton_common, "MANY", many)
            args = case.build(torch.float32)
            calls.call(op, args, "triton")
            found.append(args)
        for name, value in found[0].items():
            if isinstance(value, list):
                for one, other in zip(value, found[1][name], strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_block_has_room_for_the_tables_of_a_step(monkeypatch):
    """Of thousands of rows too: a capture, which makes no block, finds room in the warm-up's."""
    empty, tables = torch.empty, triton_common.Tables()
    monkeypatch.setattr(torch, "empty", lambda size, pin_memory=False, **of: empty(size, **of))
    for _ in range(triton_common.TABLES_IN_A_BLOCK):
        tables._pinned(10_000, CPU)
        block, used = tables._staging[CPU]
    assert used == block.numel() == triton_common.TABLES_IN_A_BLOCK * 10_000


@pytest.mark.parametrize("captured", [False, True], ids=["", "captured"])
def test_a_graph_keeps_the_tables_that_it_reads(captured, monkeypatch):
    """One that the warm-up made and the capture found, too: other tables would crowd it out."""
    tables = triton_common.Tables()
    tables.get(CPU, [[1, 1]], [1])
    monkeypatch.setattr(triton_common, "_capturing", lambda device: captured)
    found = weakref.ref(tables.get(CPU, [[1, 1]], [1]))
    monkeypatch.setattr(triton_common, "_capturing", lambda device: False)
    for i in range(triton_common.CACHED_TABLES):
        tables.get(CPU, [[i, 2]], [1])
    assert (found() is not None) == captured
