"""What torch.compile must leave alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback as _frame_callback

WHY_NOT_COMPILED = (
    "K-BFGS notes each covered layer's input between graphs: torch.compile works, with a graph"
    " break per covered layer while training; use fullgraph=False (the default)"
)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.compile leaves ``function`` alone. Unlike `torch.compiler.disable` it does
    not import the compiler where nobody has, and where nothing is compiled it costs no more than a
    call."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _frame_callback() is None:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=WHY_NOT_COMPILED))
        return disabled[0](*args, **kwargs)

    return call
