"""These tests need TRITON_INTERPRET=1 before Triton is imported: test_interpreted.py starts them.

By hand: ``TRITON_INTERPRET=1 python -m pytest tests/triton/interpreted``.
"""

import pytest

from kbfgs_ext import environment
from tests.helpers import backends, spectral_cases

if not environment.triton_interpreted():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread():
    with backends.threads(1):
        yield


@pytest.fixture(autouse=True)
def _products_alone(monkeypatch):
    spectral_cases.products_alone(monkeypatch)
