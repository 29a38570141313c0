"""How many kernels a call of every op launches for all layers of a model."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from benchmarks import launches
from kbfgs_ext.ops import triton_common
from tests.helpers import traffic
from tests.helpers.calls import empty
from tests.triton import recorder

LAUNCHES = {
    "factor_ema_": 2,
    "factor_ema_, means alone": 1,
    "hessian_action_": 2,
    "pair_ema_": 1,
    "double_damping_": 3,
    "double_damping_, Hy given": 1,
    "bfgs_update_": 2,
    "curvature_update_, ema": 4,
    "curvature_update_, minibatch": 5,
    "restart_, from A": 1,
    "restart_, from X": 1,
    "restart_, both sides": 1,
    "restart_, to I": 1,
    "restart_, a ring": 1,
    "lbfgs_two_loop_, recursion": 1,
    "lbfgs_two_loop_, compact": 3,
    "lbfgs_two_loop_, compact, a vector": 3,
    "lbfgs_push_": 1,
    "kron_precondition_": 2,
    "kron_precondition_, no H_g": 1,
    "kron_precondition_, no H_a": 1,
    "momentum_": 1,
    "descend_": 1,
    "slope_": 1,
    "output_change_": 1,
    "restore_": 1,
    "kron_step_": 4,
    "polar_": 3 * 4 + 4,
    "measure_inputs_": 1,
    "measure_pair_": 1,
    "lengths_, each": 1,
    "lengths_, shared": 1,
    "admit_": 1,
    "admit_, take": 1,
    "judge_": 1,
    "judge_, take": 1,
    "judge_, no slope, no restarts": 1,
}


@pytest.mark.parametrize("model", traffic.AUTOENCODERS)
def test_launches_for_all_layers(model):
    calls = recorder.model_calls(model, torch.float32)
    found = {what: len(recorder.launches_of(op, args)) for what, (op, args) in calls.items()}
    assert found == LAUNCHES
    assert found == {what: launches.ours(op, args, "triton") for what, (op, args) in calls.items()}
    for what in traffic.TRITON:
        assert found[what] == traffic.launches("triton", what, traffic.layers([1, 1]))


def test_programs_cover_every_row_and_tile():
    """MNIST: the figures that the configurations' comments reckon with."""
    calls = recorder.model_calls("mnist", torch.float32)
    programs = {
        launch.kernel.__name__: launch.programs
        for what in ("curvature_update_, ema", "factor_ema_", "kron_step_")
        for launch in recorder.launches_of(*calls[what])
    }
    assert programs["_first"] == 547
    assert programs["_update"] == 912
    assert programs["_squares"] == 456
    assert programs["_left"] == programs["_right"] == 744


def test_layers_that_share_scratch_go_one_by_one():
    _, args = recorder.model_calls("mnist", torch.float32)["kron_precondition_"]
    M = args["M"]
    shared = torch.empty(max(m.numel() for m in M))
    args["work"] = [shared[: m.numel()].view_as(m) for m in M]
    launches = recorder.launches_of("kron_precondition_", args)
    assert len(launches) == 2 * len(M)


def test_calls_without_layers_launch_nothing():
    for op, args in recorder.model_calls("mnist", torch.float32).values():
        assert not recorder.launches_of(op, empty(args)), op


def test_fused_multiply_adds_do_not_hang_on_tritons_default():
    """It changes with 3.10, and 3.9 warns of it at every compilation without the option."""
    given = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: given.append(options)

    triton_common.launch(Kernel(), 1, device=torch.device("cpu"), num_warps=1)
    assert given == [{"enable_fp_fusion": True, "num_warps": 1}]
