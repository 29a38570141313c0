"""The backends that run on CPU tensors here, for parametrisation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from kbfgs_ext import environment

needs_native = pytest.mark.skipif(
    environment.native_missing() is not None,
    reason=f"needs the compiled extension: {environment.native_missing()}",
)
BOTH = ("reference", pytest.param("cpu", marks=needs_native))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run on ``count`` threads. Small problems want one: a busy machine makes more a lottery."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
