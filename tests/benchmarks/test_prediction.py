"""What a step should take on a GPU: its kernels counted, and the model of time made of them."""

from pathlib import Path

import pytest
import torch

from benchmarks.step import __main__ as command
from benchmarks.step import prediction
from benchmarks.step.models import MODELS
from benchmarks.step.prediction import H100, Kernel, Step

MNIST = MODELS["mnist"]
GPU = Path(__file__).parents[2] / "docs/gpu.md"
MOST = 100  # kernels of a captured MNIST step, outside the passes' own
# With a second pass, and without; on the backends that "auto" takes, and on Triton alone.
KERNELS = {
    "PUBLISHED, safeguard": {"auto": (45,), "triton": (35,)},
    "TUNED": {"auto": (52,), "triton": (45,)},
    "defaults": {"auto": (59, 43), "triton": (66, 47)},
}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_a_captured_step(name, backend):
    kinds = prediction.steps(MNIST, prediction.settings()[name], backend)
    own = tuple(sum(k.launches for k in kinds[kind].own) for kind in sorted(kinds, reverse=True))
    assert own == KERNELS[name][backend]
    assert max(own) <= MOST


def test_the_passes_are_torch_s_own():
    """Forward and backward: 8 products, 15 more for the gradients, 7 in a frozen second pass."""
    step = prediction.steps(MNIST, prediction.settings()["TUNED"])[True]
    products = [k for k in step.passes if k.name in prediction.PRODUCTS]
    assert len(products) == (8 + 15) + (8 + 7)
    weights = sum(p.numel() for p in MNIST.build().parameters() if p.dim() == 2)
    first = 2 * 1000 * 784 * 1000  # the first layer's input has no gradient
    assert sum(k.flops for k in products) == (3 + 2) * 2 * 1000 * weights - 2 * first
    assert not [k for k in step.own if k.name in prediction.PRODUCTS]


def test_adamw():
    step = prediction.adamw(MNIST)
    assert [k.name for k in step.own] == ["_foreach_add_", "_fused_adamw_"]
    assert sum(k.launches for k in step.kernels) == 52


def test_time_is_the_longer_of_bytes_and_flops_and_a_gap():
    moving = Kernel("copy", 2, 3 * 10**9, 0)
    product = Kernel("mm", 1, 0, 6 * 10**9, 1)
    careful = Kernel("polar_", 1, 0, 6 * 10**9, 3)
    step = Step((moving,), (product, careful))
    assert moving.seconds(H100, False) == pytest.approx(1e-3)
    assert product.seconds(H100, False) == careful.seconds(H100, False) == pytest.approx(1e-4)
    assert product.seconds(H100, True) == pytest.approx(1.5e-5)
    assert careful.seconds(H100, True) == pytest.approx(4.5e-5)
    assert step.captured() == pytest.approx(4e-6 + 1e-3 + 2e-4)
    assert step.eager() == pytest.approx(step.captured())
    assert Step((), (Kernel("fill", 100, 0, 0),)).eager() == pytest.approx(4e-4)


def test_a_period_has_one_second_pass():
    kinds = {True: Step((), (Kernel("a", 11, 0, 0),)), False: Step((), (Kernel("b", 1, 0, 0),))}
    assert prediction.mean(kinds, 10, lambda s: s.own[0].launches) == pytest.approx(2.0)


def test_the_documents_table_is_the_predicted_one():
    assert prediction.markdown(prediction.predictions(MNIST)) in GPU.read_text()


def test_the_command_predicts_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(command, "run", lambda *args: pytest.fail("a step was timed"))
    assert command.main(["--model-only", "--model", "mnist", "--batch-size", "64"]) == 0
    said = capsys.readouterr().out
    assert "predicted for an H100, not measured" in said
    assert "defaults" in said and "59 / 43" in said
    assert torch.get_num_threads() > 0
