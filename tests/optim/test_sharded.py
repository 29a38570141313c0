"""Several processes that share the work, and models under `fully_shard`: one process's trajectory,
state that is divided among the ranks, and checkpoints of it."""

from __future__ import annotations

import pytest

from tests.optim.worlds import Plan, cases_of, check, marks

OF_TWO = (
    "shared_work", "chosen_by_size", "handed_out_in_pieces", "memory_falls", "bytes_shared",
    "sharded", "sharded_methods", "sharded_kinds", "sharded_loops", "sharded_precision",
    "sharded_alike", "tools_of_torch", "loaded",
)  # fmt: skip
OF_FOUR = ("shared_work", "memory_falls", "sharded", "sharded_hybrid", "loaded")
PLAN: Plan = [(2, ("saved",)), (4, OF_FOUR), (2, OF_TWO)]  # "loaded" is what "saved" has saved

pytestmark = marks


@pytest.mark.parametrize(("size", "name"), cases_of(PLAN))
def test_processes(said, size, name):
    check(said, size, name)
