"""Where the backends of an op are found: by its name, in its family's folder and in the extension.

========== =====================================================================
reference  function ``<op>`` of ``<family>/reference.py``
triton     function ``<op>`` of ``<family>/triton.py``, imported by the first call
cpu, cuda  functions ``<op>cpu`` and ``<op>cuda`` of the compiled extension
========== =====================================================================

`lbfgs_two_loop_` alone has more to its cuda backend than the extension: `lbfgs_two_loop/cuda.py`.

A Python function names the arguments that it needs and gets them by keyword; one of the extension
looks them up in the call (csrc/common/call.h).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from kbfgs_ext import environment
from kbfgs_ext.ops import registry
from kbfgs_ext.ops.registry import Call


def register(op: str, family: str) -> None:
    """All backends of ``op``."""
    registry.register(op, "reference", _python(op, family, "reference")())
    triton = _python(op, family, "triton")
    registry.register(op, "triton", lambda call: triton()(call), environment.triton_missing)
    registry.register(op, "cpu", *_native(f"{op}cpu", environment.native_missing))
    registry.register(op, "cuda", *_native(f"{op}cuda", environment.cuda_missing))


def _python(op: str, family: str, backend: str) -> Callable[[], Callable[[Call], None]]:
    """What imports the function, and hands it over as one of a call."""

    @functools.cache
    def load() -> Callable[[Call], None]:
        module = importlib.import_module(f"kbfgs_ext.ops.{family}.{backend}")
        if not hasattr(module, op):
            raise registry.Unsupported(f"{op} has no {backend} backend")
        return registry.by_name(getattr(module, op))

    return load


def _native(
    function: str, missing: Callable[[], str | None]
) -> tuple[Callable[[Call], None], Callable[[], str | None]]:
    """What calls the function, and what says why it cannot."""

    def run(call: Call) -> None:
        getattr(environment.native(), function)(call)

    def unavailable() -> str | None:
        reason = missing()
        if reason is None and not hasattr(environment.native(), function):
            reason = f"the compiled extension has no {function}"
        return reason

    return run, unavailable
