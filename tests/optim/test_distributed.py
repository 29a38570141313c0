"""Several processes: the same trajectory as one process on the whole batch, the same weights to the
bit on all ranks, and no rank that waits for ever."""

from __future__ import annotations

import pytest

from tests.optim.worlds import Plan, cases_of, check, marks

OF_TWO = (
    "defaults", "paper", "convolutions", "parts_of_a_weight", "blocks", "ema", "published", "tuned",
    "ring_of_pairs", "steps_undone", "restarts", "without_bias", "norms_in_the_fallback",
    "accumulation", "clipping", "fewer_passes",
    "other_factors", "full_second_pass", "kinds_of_ddp", "other_loops", "narrow_dtypes",
    "weights_used_by_hand", "plain_model", "unequal_batches", "empty_batch",
    "layers_of_one_rank", "random_numbers_and_buffers", "synced_batch_norm",
    "warm_start", "resume", "not_finite_on_one_rank", "a_rank_raises", "an_op_fails",
    "ranks_out_of_step",
    "optimizer_of_the_bare_model", "refusals", "bytes_sent", "others_wait_elsewhere", "last",
)  # fmt: skip
OF_FOUR = (
    "defaults", "convolutions", "blocks", "ema", "ring_of_pairs", "steps_undone",
    "norms_in_the_fallback", "accumulation", "clipping", "narrow_dtypes", "unequal_batches",
    "empty_batch", "random_numbers_and_buffers", "synced_batch_norm", "warm_start", "resume",
)  # fmt: skip
PLAN: Plan = [(4, OF_FOUR), (2, OF_TWO)]

pytestmark = marks


@pytest.mark.parametrize(("size", "name"), cases_of(PLAN))
def test_processes(said, size, name):
    check(said, size, name)
