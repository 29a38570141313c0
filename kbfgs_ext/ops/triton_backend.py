"""Registers the Triton backend of the ops; Triton itself is imported by the first call."""

from __future__ import annotations

import importlib

from kbfgs_ext import environment
from kbfgs_ext.ops import registry


def register(family: str, *ops: str) -> None:
    """Each op's ``triton`` implementation is the function of its name in ``<family>/triton.py``."""
    for op in ops:
        registry.register(op, family, "triton", environment.triton_missing)(_lazy(family, op))


def _lazy(family: str, op: str):
    def run(*args) -> None:
        module = importlib.import_module(f"kbfgs_ext.ops.{family}.triton")
        getattr(module, op)(*args)

    return run
