"""Ops are tested on one thread; what more threads may change is tested on its own."""

import pytest

from tests.helpers import backends


@pytest.fixture(autouse=True)
def one_thread():
    with backends.threads(1):
        yield
