"""The cost model, by hand and against the figures that the documents reckon with."""

import pytest
import torch

from kbfgs_ext.bench.cases import KERNELS, shapes
from kbfgs_ext.bench.cost import Cost, cost
from kbfgs_ext.bench.kernel import Layer, Numbers
from kbfgs_ext.ops import registry
from tests.helpers import cases, traffic

M, D_IN, D_OUT = Numbers.batch, 3, 5
N_A, N_G = D_IN + 1, D_OUT
N, COUNTS, LAM = N_G * N_A, 4 * 8, 8  # an int64 counter row and a float64 scalar, in bytes
BY_HAND = {
    "factor_ema_": Cost(4 * (1.5 * N_A**2 + N_A + M * D_IN), M * N_A * (N_A + 1)),
    "hessian_action_": Cost(4 * (N_A + M * D_IN + N_A) + LAM, 4 * M * D_IN),
    "pair_ema_": Cost(4 * (4 * N_G + 3 * N_G), 7 * N_G),
    "double_damping_": Cost(
        4 * (5 * N_G + N_G**2) + 2 * COUNTS + LAM, 2 * N_G**2 + 8 * N_G
    ),
    "bfgs_update_": Cost(
        4 * (2 * (N_A**2 + N_G**2) + 3 * (N_A + N_G)) + 2 * 2 * COUNTS, 6 * (N_A**2 + N_G**2)
    ),
    "curvature_update_, ema": Cost(
        4 * (3 * N_A**2 + 2 * N_G**2 + N_A + 7 * N_G) + 4 * COUNTS + 2 * LAM,
        10 * N_A**2 + 6 * N_G**2,
    ),
    "curvature_update_, minibatch": Cost(
        4 * (2 * N_A**2 + M * D_IN + 2 * N_G**2 + N_A + 7 * N_G) + 4 * COUNTS + 2 * LAM,
        8 * N_A**2 + 4 * M * D_IN + 6 * N_G**2,
    ),
    "restart_": Cost(2 * 3 * 8 + COUNTS, 0),
    "lbfgs_two_loop_, p = 10": Cost(4 * (2 * N + 2 * 10 * N_G + 10) + 8, 8 * 10 * N),
    "lbfgs_two_loop_, p = 100": Cost(4 * (2 * N + 2 * 100 * N_G + 100) + 8, 8 * 100 * N),
    "lbfgs_push_": Cost(4 * (2 * N_G + 1 + 3 * N_G) + 2 * 8 + 2 * COUNTS, 8 * N_G),
    "kron_precondition_": Cost(4 * (2 * N + N_A**2 + N_G**2), 2 * N * (N_A + N_G)),
    "kron_step_": Cost(
        4 * (2 * N + 2 * N + N + N + N_A**2 + N_G**2) + LAM, 2 * N * (N_A + N_G) + 7 * N
    ),
    "momentum_": Cost(4 * (2 * N + N + N), 5 * N),
    "descend_": Cost(4 * (2 * N + 2 * N) + LAM, 2 * N),
    "slope_": Cost(4 * (3 * N + N_G), 3 * N),
    "output_change_": Cost(4 * (2 * N + 2 * N_A + N_G), 5 * N),
    "restore_": Cost(4 * (N + N) + 1, 0),
    "polar_": Cost(4 * 2 * N, 3 * N_A**2 * N_G + (4 * 4 - 3) * N_A**3),
    "polar_, inverses": Cost(4 * 2 * N, 3 * N_A**2 * N_G + 2 * N_A**3),
    "judge_": Cost(4 * (2 * 1 + 2 * 4 + 3) + 2 * COUNTS + 2 * 5, 0),
    "admit_": Cost(4 * (1 + 16) + 2 * COUNTS + 2 * 5 + 1, 0),
    "lengths_": Cost(8 * (1 + 1 + 1) + 4 * 1, 0),
    "measure_inputs_": Cost(8 * (2 + 1 + 1) + 4 * 1, 0),
    "measure_pair_": Cost(2 * 2 * 8 + 4 * 5 * N_G, 7 * N_G),
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_by_hand(kernel):
    args = kernel.build((Layer(D_IN, D_OUT),), Numbers("meta"))
    assert cost(kernel.op, args) == BY_HAND[kernel.name]


def test_costs_of_layers_add_up():
    for kernel in KERNELS:
        one, other = Layer(3, 5), Layer(4, 2, bias=False)
        costs = [
            cost(kernel.op, kernel.build(layers, Numbers("meta")))
            for layers in ((one,), (other,), (one, other))
        ]
        # One flag, one step size for all layers.
        common = {"restore_": 1, "lengths_": 8}.get(kernel.op, 0)
        assert costs[2].bytes == costs[0].bytes + costs[1].bytes - common
        assert costs[2].flops == costs[0].flops + costs[1].flops


@pytest.mark.parametrize("op", sorted(registry.ops()))
def test_every_op_has_its_cost_in_every_way_of_calling(op):
    for case in cases.of(op):
        narrow, wide = (cost(op, case.build(t)) for t in (torch.float32, torch.float64))
        assert narrow.flops == wide.flops >= 0
        counters = op == "restart_"  # which reads and writes nothing else
        assert 0 < narrow.bytes < wide.bytes + counters
        assert wide.bytes <= 2 * narrow.bytes


@pytest.mark.parametrize("model", traffic.AUTOENCODERS)
def test_floors_are_those_of_the_traffic_tables(model):
    """Which leave the vectors out."""
    layers = traffic.layers(traffic.AUTOENCODERS[model])
    floors = {k.name: k for k in KERNELS if k.name in traffic.FLOOR}
    assert set(floors) == set(traffic.FLOOR)
    for name, kernel in floors.items():
        args = kernel.build(shapes()[model], Numbers("meta"))
        assert cost(kernel.op, args).bytes == pytest.approx(traffic.FLOOR[name](layers), rel=0.01)


def test_figures_of_the_documents():
    """MNIST: 65 MB of factors, 9 GFLOP of direction, 3.3 of statistics."""
    by = {}
    for kernel in KERNELS:
        by[kernel.name] = cost(kernel.op, kernel.build(shapes()["mnist"], Numbers("meta")))
    assert by["curvature_update_, ema"].bytes == pytest.approx(65e6, rel=0.01)
    assert by["kron_precondition_"].flops == pytest.approx(9e9, rel=0.05)
    assert by["factor_ema_"].flops == pytest.approx(3.3e9, rel=0.05)
