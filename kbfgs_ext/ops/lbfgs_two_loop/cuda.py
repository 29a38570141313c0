"""lbfgs_two_loop, the cuda backend: the CUDA kernels of csrc/lbfgs_two_loop."""

from __future__ import annotations

from kbfgs_ext import environment
from kbfgs_ext.ops.lbfgs_two_loop import reference
from kbfgs_ext.ops.registry import register


@register("lbfgs_push_", "lbfgs_two_loop", "cuda", environment.cuda_missing)
def lbfgs_push_(*args) -> None:
    environment.native().lbfgs_push_cuda(*args)


@register("lbfgs_two_loop_", "lbfgs_two_loop", "cuda", environment.cuda_missing)
def lbfgs_two_loop_(out, Q, S, Y, rho, pushed, form) -> None:
    """The recursion's kernel; the compact form is matrix products, which torch hands to cuBLAS."""
    native = environment.native()
    if form == "compact" or (form == "auto" and not _recursion_fits(native, Q, S)):
        reference.lbfgs_two_loop_(out, Q, S, Y, rho, pushed, "compact")
    else:
        native.lbfgs_two_loop_cuda(out, Q, S, Y, rho, pushed)


def _recursion_fits(native, Q, S) -> bool:
    """Whether the kernel can hold these columns on chip (csrc/lbfgs_two_loop)."""
    return all(
        native.two_loop_fits(len(q), q.numel() // len(q), len(s), q.element_size())
        for q, s in zip(Q, S, strict=True)
    )
