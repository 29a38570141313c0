"""fp32 products follow torch's setting, by whichever of its two interfaces it was made."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from kbfgs_ext import environment
from kbfgs_ext.ops import autotune
from tests.triton import recorder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def everything():
    return torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def as_found():
    yield
    torch.set_float32_matmul_precision("highest")
    for place in everything():
        place.fp32_precision = "none"


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_old_setting(setting, device):
    torch.set_float32_matmul_precision(setting)
    assert environment.float32_matmul_precision(device) == setting


def test_the_new_settings():
    """Of all devices, or of one kind; the old question raises where they contradict one another."""
    backends, cuda, cpu = everything()
    both = environment.float32_matmul_precision
    assert (both(CPU), both(CUDA)) == ("highest", "highest")
    backends.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    assert (both(CPU), both(CUDA)) == ("high", "high")
    cuda.fp32_precision = "ieee"
    assert (both(CPU), both(CUDA)) == ("high", "highest")
    cpu.fp32_precision = "bf16"
    assert (both(CPU), both(CUDA)) == ("medium", "highest")


def test_the_new_setting_after_the_old():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert environment.float32_matmul_precision(CUDA) == "highest"


@pytest.mark.parametrize("tuned", [False, True], ids=["", "autotuned"])
@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("ieee", {"kron_precondition_": "ieee", "kron_step_": "ieee", "polar_": "tf32x3"}),
        ("tf32", {"kron_precondition_": "tf32", "kron_step_": "tf32", "polar_": "tf32"}),
    ],
)
def test_launches_follow_the_new_settings(setting, wanted, tuned, monkeypatch):
    monkeypatch.setenv("KBFGS_AUTOTUNE", str(int(tuned)))
    monkeypatch.setattr(autotune, "_seconds", lambda *_: 1.0)
    monkeypatch.setattr(autotune, "_chosen", {})
    torch.backends.fp32_precision = setting
    calls = recorder.calls_of((7, 5), torch.float32, batch=3)
    for what, precision in wanted.items():
        found = [launch.options.get("PRECISION") for launch in recorder.launches_of(*calls[what])]
        assert precision in found and set(found) <= {precision, None}, what
