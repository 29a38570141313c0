"""What torch.compile must leave alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

WHY_NOT_COMPILED = (
    "K-BFGS notes each covered layer's input between graphs: torch.compile works, with a graph"
    " break per covered layer while training; use fullgraph=False (the default)"
)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.compile leaves ``function`` alone. Unlike `torch.compiler.disable` it does
    not import the compiler where nobody has."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled and "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=WHY_NOT_COMPILED))
        return disabled[0](*args, **kwargs)

    return call
