"""Tests that need a GPU: skipped elsewhere, naming the machine that would run them."""

from __future__ import annotations

import pytest
import torch

from kbfgs_ext import environment
from tests.helpers import spectral_cases

MACHINE = "a machine with an NVIDIA GPU (sm_80 or later) and a CUDA build of torch: make test-gpu"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs {MACHINE}"))


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    """A backend of the GPU; missing is a failure here, since the machine could have it."""
    missing = {"cuda": environment.cuda_missing, "triton": environment.triton_missing}
    reason = missing[request.param]()
    assert reason is None, f"{request.param}: {reason}"
    return request.param


@pytest.fixture(autouse=True)
def _products_alone(monkeypatch):
    spectral_cases.products_alone(monkeypatch)
