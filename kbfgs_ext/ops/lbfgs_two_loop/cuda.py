"""lbfgs_two_loop_ on CUDA: the extension has the recursion, torch the compact form."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops import registry
from kbfgs_ext.ops.lbfgs_two_loop.api import lbfgs_two_loop_
from kbfgs_ext.ops.registry import Call

OP = lbfgs_two_loop_.__name__


def run(call: Call) -> None:
    """The recursion's kernel; the compact form is matrix products, which torch hands to cuBLAS."""
    native, form = environment.native(), call["form"]
    if form == "compact" or (form == "auto" and not _recursion_fits(native, call["Q"], call["S"])):
        registry.implementation(OP, "reference").run(call | {"form": "compact"})
    else:
        native.lbfgs_two_loop_cuda(call)


def _recursion_fits(native, Q, S) -> bool:
    """Whether the kernel can hold these columns on chip (csrc/lbfgs_two_loop)."""
    return all(
        native.two_loop_fits(len(q), q.numel() // len(q), len(s), q.element_size())
        for q, s in zip(Q, S, strict=True)
    )


registry.register(OP, "cuda", run, environment.cuda_missing)
