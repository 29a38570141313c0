"""Declares ops with ``torch.library``: the signature of an op's public function is its schema.

Every op takes lists with one entry per layer: all layers of a model in one call (`judge_`: one per
judgement). It writes the arguments named in ``writes``, reads the others, and returns nothing.
``ok`` is a bool scalar on the device: where it is false the op leaves its named outputs as they
were. ``backend``, the last argument, is "auto", "reference", "cpu", "cuda" or "triton". Shapes and
equations stand in each family's ``api.py``, symbols in this folder's README.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

import torch

from kbfgs_ext.ops import backends, registry

P = ParamSpec("P")

KERNELS: dict[str, Callable[..., None]] = {}  # what the dispatcher calls, by the op's name

_library = torch.library.Library("kbfgs_ext", "DEF")


def _looked_at() -> bool:
    """Whether someone wants to see the calls of ops: a mode (fake tensors, counters) or a
    profiler."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()


def op(family: str, writes: tuple[str, ...]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorator: an op of the function's name and arguments, which its body has only to check.

    The dispatcher binds the arguments by the same signature, so none of them is named again.
    """

    def declare(check: Callable[P, None]) -> Callable[P, None]:
        name = check.__name__
        _library.define(torch.library.infer_schema(check, op_name=name, mutates_args=writes))
        declared = registry.declare(name, family, inspect.signature(check))
        backends.register(name, family)

        def kernel(*args, **kwargs) -> None:
            call = declared.call(args, kwargs)
            registry.run(name, call.pop("backend"), call)

        KERNELS[name] = kernel
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"kbfgs_ext::{name}", lambda *args, **kwargs: None, lib=_library
        )
        overload = getattr(torch.ops.kbfgs_ext, name).default

        @functools.wraps(check)
        def face(*args: P.args, **kwargs: P.kwargs) -> None:
            check(*args, **kwargs)
            if registry.watching() and not _looked_at():
                kernel(*args, **kwargs)  # a step's own call: the dispatcher would only copy lists
            else:
                overload(*declared.positional(args, kwargs))  # which the dispatcher takes faster

        return face

    return declare
