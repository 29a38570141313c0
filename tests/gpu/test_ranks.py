"""Several processes on a GPU: the same trajectory as one process. Two of gloo share the device;
NCCL wants a device for each, so that there is but one of it, which goes all the ways of several."""

import pytest

from tests.optim.worlds import Plan, cases_of, check, marks, run

GLOO: Plan = [
    (2, (
        "defaults", "paper", "convolutions", "blocks", "ema", "ring_of_pairs", "steps_undone",
        "restarts", "norms_in_the_fallback", "accumulation", "unequal_batches", "empty_batch",
        "warm_start", "not_finite_on_one_rank", "a_rank_raises", "shared_work",
    )),
]  # fmt: skip
NCCL: Plan = [
    (1, ("defaults", "paper", "convolutions", "blocks", "ema", "shared_work", "sharded",
         "sharded_methods", "sharded_kinds")),
]  # fmt: skip
pytestmark = [pytest.mark.gpu, *marks]


@pytest.fixture(scope="module")
def on_gloo(tmp_path_factory):
    return run(GLOO, tmp_path_factory.mktemp("gloo"), device="cuda")


@pytest.fixture(scope="module")
def on_nccl(tmp_path_factory):
    return run(NCCL, tmp_path_factory.mktemp("nccl"), "nccl", "cuda")


@pytest.mark.xdist_group("gloo")  # one worker makes the processes
@pytest.mark.parametrize(("size", "name"), cases_of(GLOO))
def test_two_processes_share_a_device(on_gloo, size, name):
    check(on_gloo, size, name)


@pytest.mark.xdist_group("nccl")
@pytest.mark.parametrize(("size", "name"), cases_of(NCCL))
def test_nccl_with_one_rank(on_nccl, size, name):
    check(on_nccl, size, name)
