"""The CUDA functions of kbfgs_ext._C on the host, in place of the extension."""

from __future__ import annotations

import shutil

import pytest

from kbfgs_ext import environment
from tests.cuda_host import build
from tests.helpers import backends


@pytest.fixture(scope="session")
def module():
    """The host module; compiled by the first run after a change (about two minutes)."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++: a machine with a C++ compiler runs this")
    return build.load()


@pytest.fixture
def host(module, monkeypatch):
    """``environment.native()`` is the host module, on a machine of 3 multiprocessors."""
    monkeypatch.setattr(environment, "native", lambda: module)
    module.set_machine(3, 200 * 1024, False)
    with backends.threads(1):
        yield module
