"""Launches counted: what the READMEs' tables say of a step, from the launcher itself."""

import pytest
import torch

from benchmarks import launches
from kbfgs_ext.ops import registry
from tests.cuda_host.oncpu import run
from tests.helpers import calls, cases, compare, kron_cases, traffic

# d_in, d_out of the autoencoders, sizes divided by 10 so that the host gets through them: launches
# depend on the number of layers and on which are small, not on the sizes beyond that.
LAYERS = [(78, 100), (100, 50), (50, 25), (25, 30), (30, 25), (25, 50), (50, 100), (100, 78)]


@pytest.mark.parametrize(
    ("name", "build", "count", "cooperative"),
    [
        ("curvature_update_", cases.curvature_update(LAYERS, "both"), 1, True),
        ("curvature_update_", cases.curvature_update(LAYERS, "both", 9, from_X=True), 1, True),
        ("curvature_update_", cases.curvature_update(LAYERS, "lm", sides="g"), 1, True),
        ("factor_ema_", cases.factor_ema([n for n, _ in LAYERS], 9), 1, True),
        ("hessian_action_", cases.hessian_action([n for n, _ in LAYERS], 9), 1, True),
        ("bfgs_update_", cases.bfgs_update((78, 100), give_Hy=True), 1, False),
        ("bfgs_update_", cases.bfgs_update((78, 100)), 2, False),
        ("restart_", cases.restart((78, 100), "A"), 1, False),
        ("restart_", cases.restart((78, 100), "ring"), 1, False),
        ("pair_ema_", cases.pair_ema((78, 100)), 1, False),
        ("double_damping_", cases.double_damping((78, 100), "both", with_H=False), 1, False),
        ("double_damping_", cases.double_damping((78, 100), "both"), 3, False),
        ("lbfgs_two_loop_", cases.two_loop((78, 100), 3, 4, 9, "recursion"), 1, False),
        ("lbfgs_two_loop_", cases.two_loop((78, 100), 3, 4, None, "recursion"), 1, False),
        ("lbfgs_push_", cases.push((78, 100), 3, 4), 1, False),
        ("momentum_", cases.momentum(LAYERS), 1, False),
        ("descend_", cases.descend(LAYERS), 1, False),
        ("slope_", cases.slope(LAYERS), 1, False),
        ("output_change_", cases.output_change(LAYERS), 1, False),
        ("restore_", cases.restore(LAYERS, True), 1, False),
        ("measure_inputs_", cases.measure_inputs((1.0,) * 8), 1, False),
        ("measure_pair_", cases.measure_pair((78, 100)), 1, False),
        ("lengths_", cases.lengths([(1.0, 2.0)], True), 1, False),
        ("admit_", cases.admit(16), 1, False),
        ("judge_", cases.judge(), 1, False),
        # Beside cuBLAS's products: two for X, two for (17), one an iteration.
        ("polar_", cases.polar([(78, 100), (100, 50)]), 4 + 4, False),
        ("polar_", cases.polar([(78, 100), (100, 50)], iterations=1), 4 + 1, False),
        ("kron_precondition_", cases.kron_precondition(LAYERS), 1, False),
        ("kron_precondition_", cases.kron_precondition(LAYERS, without="H_a"), 1, False),
        # All small: momentum; direction and step.
        ("kron_step_", cases.kron_step(LAYERS), 2, False),
        ("kron_step_", cases.kron_step([(200, 130)]), 2, False),  # and two products by cuBLAS
    ],
)
def test_launches_of_all_layers(host, name, build, count, cooperative):
    args = build(torch.float32)
    run(name, args)
    assert len(host.launches()) == count
    products = host.products()  # by cuBLAS
    assert launches.ours(name, args, "cuda") == count + products
    assert all(launch[3] == cooperative for launch in host.launches())


def test_tiles_that_share_a_factor_are_one_product(host):
    """300 x 420 in 2 x 3 blocks: two products with H_g, three with H_a."""
    args = kron_cases.kron_precondition_grid([(300, 420)], 2, 3)(torch.float32)
    truth = calls.run("kron_precondition_", calls.widened(args), "reference")
    registry.implementation("kron_precondition_", "cuda").run(args)  # and not copies: see oncpu.run
    assert (len(host.launches()), host.products()) == (0, 2 + 3)
    assert launches.ours("kron_precondition_", args, "cuda") == 2 + 3
    for got, wanted in zip(args["P"], truth["P"], strict=True):
        compare.assert_equal_to(got, wanted, 300, wanted.abs().max().item())
    for side, products in (("H_g", 3), ("H_a", 2)):
        assert launches.ours("kron_precondition_", args | {side: []}, "cuda") == products


MANY = [(3, 2)] * 130  # three tables of 64


@pytest.mark.parametrize(
    ("name", "build", "count"),
    [
        ("curvature_update_", cases.curvature_update(MANY), 3),
        ("bfgs_update_", cases.bfgs_update((3,) * 130), 6),
        ("double_damping_", cases.double_damping((3,) * 130, "lm"), 9),
        ("kron_precondition_", cases.kron_precondition(MANY), 3),
        ("kron_step_", cases.kron_step(MANY), 6),
        ("measure_inputs_", cases.measure_inputs((1.0,) * 130), 3),
        ("restart_", cases.restart((3,) * 130, "A"), 3),
        ("polar_", cases.polar(MANY), 3 * 8),
    ],
)
def test_more_layers_than_a_table_holds_are_split(host, name, build, count):
    """The groups of a depthwise convolution, say."""
    args = build(torch.float32)
    run(name, args)
    assert len(host.launches()) == count
    assert launches.ours(name, args, "cuda") == count + host.products()


def test_factors_stay_on_chip_where_they_fit(host):
    """Shared memory covers a block's part of the factors: one read and one write of each."""
    run("curvature_update_", cases.curvature_update(LAYERS)(torch.float32))
    ((blocks, _, shared, _),) = host.launches()
    model = traffic.layers([78, 100, 50, 25, 30, 25, 50, 100, 78])
    device = traffic.Device(3, 200 * 1024)  # the host fixture's
    assert blocks == traffic.blocks_of(model, device)
    assert shared == traffic.chip_bytes(model, device)
    assert traffic.rows_read_again(model, device) == (0, 0)


@pytest.mark.parametrize("m", [4, 4000])
def test_a_large_batch_gives_small_layers_more_blocks(host, m):
    """X is shared out among them as the factors are."""
    host.set_machine(7, 200 * 1024, False)
    run(
        "curvature_update_",
        cases.curvature_update([(16, 16)] * 2, "both", m, from_X=True)(torch.float32),
    )
    ((blocks, *_),) = host.launches()
    model = traffic.layers([16, 16, 16], m)
    assert blocks == traffic.blocks_of(model, traffic.Device(7, 200 * 1024), from_X=True)
    assert blocks == (1 if m == 4 else 7)
