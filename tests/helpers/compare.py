"""The one place of tolerance.

The float64 reference is truth. A kernel's error may be at most twice the error of the reference
at the kernel's own dtype, plus a floor of a few roundings: a reference that is exact by luck (a
size of 1, a power of two) must not forbid the last bit.
"""

from __future__ import annotations

import torch

from tests.helpers import calls, spectral_cases

TIMES_REFERENCE = 2.0
FLOOR_ROUNDINGS = 8.0  # of the largest number involved, in units of the dtype's epsilon


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest absolute difference between finite entries."""
    finite = torch.isfinite(got) & torch.isfinite(truth)
    difference = (got.double() - truth.double())[finite]
    return difference.abs().max().item() if difference.numel() else 0.0


def allowed(reference: torch.Tensor, truth: torch.Tensor, scale: float | None = None) -> float:
    """The largest error a kernel may have where ``reference`` has its own.

    ``scale`` is the largest magnitude that entered the result, where that is larger than the result
    itself (what is subtracted from).
    """
    largest = error(truth, torch.zeros_like(truth))
    largest = max(largest, scale or 0.0)
    floor = FLOOR_ROUNDINGS * torch.finfo(reference.dtype).eps * largest
    return TIMES_REFERENCE * error(reference, truth) + floor


def assert_as_accurate(
    got: torch.Tensor,
    reference: torch.Tensor,
    truth: torch.Tensor,
    name: str = "result",
    scale: float | None = None,
    unseen: float = 0.0,
) -> None:
    """``got`` is as accurate as ``reference`` (same dtype), judged by ``truth`` (float64), which
    has an error of its own, ``unseen``.

    Integers and booleans must agree exactly, and so must the places that are not finite.
    """
    assert got.shape == reference.shape, f"{name}: shape {got.shape}, not {reference.shape}"
    assert got.dtype == reference.dtype, f"{name}: dtype {got.dtype}, not {reference.dtype}"
    if not got.is_floating_point():
        assert torch.equal(got, reference), f"{name}: {got.tolist()}, not {reference.tolist()}"
        return
    assert torch.equal(torch.isfinite(got), torch.isfinite(reference)), (
        f"{name}: {(~torch.isfinite(got)).sum()} entries are not finite,"
        f" {(~torch.isfinite(reference)).sum()} of the reference"
    )
    found = error(got, truth)
    bound = allowed(reference, truth, scale) + TIMES_REFERENCE * unseen
    assert found <= bound, f"{name}: error {found:.3e}, allowed {bound:.3e}"


def assert_call_as_accurate(
    op: str,
    got: calls.Args,
    reference: calls.Args,
    truth: calls.Args,
    before: calls.Args,
    unseen: dict[str, float] | None = None,
) -> None:
    """What a call of ``op`` on ``before`` has written is as accurate as the reference's results,
    and what it only reads has kept its bits. ``unseen`` is the truth's own error, by name."""
    for (name, g), (_, r), (_, t), (_, b) in zip(
        *(calls.flat(op, side, True) for side in (got, reference, truth, before)), strict=True
    ):
        if name.startswith("work"):
            continue
        own = (unseen or {}).get(name, 0.0)
        assert_as_accurate(g, r, t, name, entered(op, before, b, t), own)
    for (name, g), (_, b) in zip(
        calls.flat(op, got, False), calls.flat(op, before, False), strict=True
    ):
        assert_same_bits(g, b, f"{name}, which is only read,")


def entered(op: str, args: calls.Args, before: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest magnitude that entered a result that was ``before``: the scale of rounding."""
    if not before.is_floating_point():
        return 0.0
    if op == "lbfgs_two_loop_":
        return max(truth.abs().max().item(), args["Q"][0].abs().max().item())
    if op == "polar_":
        return spectral_cases.slope(args["coefficients"])
    largest = error(before, torch.zeros_like(before))
    if op in ("bfgs_update_", "curvature_update_"):
        return 2 * largest  # (9) is a difference of terms that are larger than H
    return largest


def rounding(dtype: torch.dtype, terms: int, scale: float) -> float:
    """What an honest sum of ``terms`` numbers of size ``scale`` may lose at ``dtype``."""
    return FLOOR_ROUNDINGS * terms * torch.finfo(dtype).eps * scale


def assert_equal_to(
    got: torch.Tensor, oracle: torch.Tensor, terms: int, scale: float, name: str = "result"
) -> None:
    """``got`` is the oracle's result (another route to it), but for the rounding of its sums."""
    assert torch.isfinite(got).all(), f"{name} is not finite"
    found, bound = error(got, oracle), rounding(got.dtype, terms, scale)
    assert found <= bound, f"{name}: error {found:.3e}, allowed {bound:.3e}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaN equals NaN and 0 differs from -0."""
    if not tensor.is_floating_point():
        return tensor
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(whole)


def assert_same_bits(got: torch.Tensor, wanted: torch.Tensor, name: str = "result") -> None:
    """``got`` is ``wanted``, bit for bit."""
    assert got.dtype == wanted.dtype, f"{name}: dtype {got.dtype}, not {wanted.dtype}"
    assert torch.equal(bits(got), bits(wanted)), f"{name} is not the same bit for bit"
