"""kron_precondition: the direction P = H_g M H_a, and the step around it.

In every op here a layer without a bias has an empty tensor in the place of its bias.
"""

from __future__ import annotations

import torch

from kbfgs_ext import environment
from kbfgs_ext.ops import checks
from kbfgs_ext.ops.checks import Tensors
from kbfgs_ext.ops.library import op
from kbfgs_ext.ops.registry import Call, prefer


@op("kron_precondition", writes=("P", "work"))
def kron_precondition_(
    P: Tensors, H_g: Tensors, M: Tensors, H_a: Tensors, work: Tensors, backend: str = "auto"
) -> None:
    """The Kronecker-preconditioned direction of all layers.

    (3)  P = H_g M H_a,  that is (H_a x H_g) vec(M)

    Args:
        P: (n_g, n_a) each, written. P, M and work may be tiles of larger matrices, one for
            every block of a block-diagonal H_g and of an H_a.
        H_g: (n_g, n_g) each, symmetric; an empty list is the identity: P = M H_a.
        M: (n_g, n_a) each.
        H_a: (n_a, n_a) each, symmetric; an empty list is the identity: P = H_g M.
        work: (n_g, n_a) each, scratch for the inner product, which there is with both factors. On
            the CPU layers may share its storage; the GPU backends work on all layers at once and
            need one each.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit, or both factors are missing.

    Source: step 4 of the algorithm.
    """
    checks.backend(backend)
    factors = {name: H for name, H in (("H_g", H_g), ("H_a", H_a)) if H}
    if M and not factors:
        raise ValueError("H_g and H_a must not both be empty")
    checks.same_length(P=P, M=M, work=work, **factors)
    wanted = _shapes(M)
    for name, tensors in ({"P": P, "work": work} | factors).items():
        checks.shapes(name, tensors, wanted[name])
        checks.alike(name, tensors, M)


@op("kron_precondition", writes=("M",))
def momentum_(
    M: Tensors,
    dW: Tensors,
    db: Tensors,
    W: Tensors,
    b: Tensors,
    momentum: float,
    weight_decay: float,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """The moving average of the regularised gradient, for all layers.

    (2)  M <- momentum*M + (1-momentum) * ([dW, db] + weight_decay*[W, b])

    Args:
        M: (n_g, n_a) each, updated.
        dW, W: (n_g, d_in) each. db, b: (n_g,) each, or empty without a bias.
        momentum: in [0, 1).
        weight_decay: the regulariser is weight_decay/2 * ||[W, b]||^2.
        ok: bool scalar on the device; where false M stays.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype, device or ``momentum`` does not fit.

    Source: step 2 of the algorithm.
    """
    checks.backend(backend)
    checks.fraction("momentum", momentum)
    checks.same_length(M=M, dW=dW, db=db, W=W, b=b)
    _check_parameters(M, ("dW", dW), ("W", W), ("db", db), ("b", b))


@op("kron_precondition", writes=("W", "b", "P"))
def descend_(
    W: Tensors,
    b: Tensors,
    P: Tensors,
    step_size: Tensors,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Take the step and leave the parameters of before in the place of the direction.

    (4)  [W, b], P <- [W, b] - step_size*P, [W, b]

    Args:
        W: (n_g, d_in) each, updated. b: (n_g,) each, updated, or empty without a bias.
        P: (n_g, n_a) each: the direction; afterwards [W, b] of before, for `restore_`.
        step_size: float64 scalar each, on the device: learning rate times the safeguard's scale.
        ok: bool scalar on the device; where false the parameters stay (P is still overwritten).
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: step 4 of the algorithm.
    """
    checks.backend(backend)
    checks.same_length(W=W, b=b, P=P, step_size=step_size)
    _check_parameters(P, ("W", W), ("b", b))


@op("kron_precondition", writes=("slope",))
def slope_(
    slope: Tensors,
    W: Tensors,
    b: Tensors,
    saved: Tensors,
    dW: Tensors,
    db: Tensors,
    backend: str = "auto",
) -> None:
    """The change of the loss that the gradient promises for the step just taken, by output.

    (13)  slope_i = sum over j of [dL/dW, dL/db]_ij * ([W, b] - saved)_ij

    The sum over outputs and layers is the derivative of the loss along the step.

    Args:
        slope: (n_g,) each, written; in the units of the loss.
        W: (n_g, d_in) each, after the step. b: (n_g,) each, or empty without a bias.
        saved: (n_g, n_a) each: what `descend_` left, [W, b] of before.
        dW: (n_g, d_in) each. db: (n_g,) each, or empty without a bias.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: the sufficient decrease of Armijo (1966), which the safeguard looks for.
    """
    checks.backend(backend)
    checks.same_length(slope=slope, W=W, b=b, saved=saved, dW=dW, db=db)
    _check_parameters(saved, ("W", W), ("dW", dW), ("b", b), ("db", db))
    checks.shapes("slope", slope, [(t.shape[0],) for t in saved])
    checks.alike("slope", slope, saved)


@op("kron_precondition", writes=("change",))
def output_change_(
    change: Tensors,
    W: Tensors,
    b: Tensors,
    saved: Tensors,
    a_bar: Tensors,
    a_bar_next: Tensors,
    backend: str = "auto",
) -> None:
    """How the mean output of a layer has changed from the first pass to the second.

    (15)  change = ([W, b] - saved) a_bar_next + saved (a_bar_next - a_bar)

    It is [W, b] a_bar_next - saved a_bar without the difference of two large numbers: what is
    subtracted are neighbours, entry by entry, and [W, b] - saved is the step just taken.

    Args:
        change: (n_g,) each, written.
        W: (n_g, d_in) each, after the step. b: (n_g,) each, or empty without a bias.
        saved: (n_g, n_a) each: what `descend_` left, [W, b] of before.
        a_bar, a_bar_next: (n_a,) each: mean input rows of the two passes, the last entry 1 with a
            bias.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: the change of h_bar in step 6 of the algorithm, for a linear layer.
    """
    checks.backend(backend)
    checks.same_length(change=change, W=W, b=b, saved=saved, a_bar=a_bar, a_bar_next=a_bar_next)
    _check_parameters(saved, ("W", W), ("b", b))
    sizes = [(n_a,) for _, n_a in (t.shape for t in saved)]
    checks.shapes("change", change, [(t.shape[0],) for t in saved])
    checks.shapes("a_bar", a_bar, sizes)
    checks.shapes("a_bar_next", a_bar_next, sizes)
    for name, tensors in {"change": change, "a_bar": a_bar, "a_bar_next": a_bar_next}.items():
        checks.alike(name, tensors, saved)


@op("kron_precondition", writes=("W", "b"))
def restore_(
    W: Tensors, b: Tensors, saved: Tensors, undo: torch.Tensor, backend: str = "auto"
) -> None:
    """Put the parameters of before the step back where ``undo`` is true: exactly, bit for bit.

    Args:
        W: (n_g, d_in) each, updated. b: (n_g,) each, updated, or empty without a bias.
        saved: (n_g, n_a) each: what `descend_` left.
        undo: bool scalar on the device.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    checks.backend(backend)
    checks.same_length(W=W, b=b, saved=saved)
    _check_parameters(saved, ("W", W), ("b", b))


@op("kron_precondition", writes=("sizes",))
def lengths_(
    sizes: Tensors,
    norms: Tensors,
    roots: Tensors,
    step_size: Tensors,
    shared: bool,
    backend: str = "auto",
) -> None:
    """How far the layers of a group go along their directions, from the lengths of these.

    (23)  r_i = ||P_i||_F/sqrt(rows_i);  size_i = step_size/r_i, and R/r_i of it where ``shared``,
          with R the same of the rows of all P

    A direction of length 0 counts as one of 1e-20.

    Args:
        sizes: (layers,) for each group, written.
        norms: (layers,) each: ||P_i||_F.
        roots: (layers,) each: sqrt(rows_i).
        step_size: scalar each, on the device; like ``sizes`` and ``roots`` float64, or on devices
            without it float32.
        shared: all layers of a group take an equal share of its length.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    checks.backend(backend)
    checks.same_length(norms=norms, sizes=sizes, roots=roots, step_size=step_size)
    for i, norm in enumerate(norms):
        checks.real("norms", i, norm)
        checks.real("sizes", i, sizes[i])
        checks.shape("step_size", i, step_size[i])
        for name, given in (("sizes", sizes[i]), ("roots", roots[i]), ("norms", norm)):
            checks.shape(name, i, given, norm.numel())
        for name, given in (("roots", roots[i]), ("step_size", step_size[i])):
            checks.like(name, i, given, sizes[i])


@op("kron_precondition", writes=("W", "b", "M", "P", "work"))
def kron_step_(
    W: Tensors,
    b: Tensors,
    M: Tensors,
    P: Tensors,
    work: Tensors,
    dW: Tensors,
    db: Tensors,
    H_g: Tensors,
    H_a: Tensors,
    step_size: Tensors,
    momentum: float,
    weight_decay: float,
    ok: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """`momentum_`, `kron_precondition_` and `descend_` in one call, for all layers.

    Arguments, shapes and errors are theirs; equations (2), (3), (4).
    """
    checks.backend(backend)
    checks.fraction("momentum", momentum)
    checks.same_length(
        W=W, b=b, M=M, P=P, work=work, dW=dW, db=db, H_g=H_g, H_a=H_a, step_size=step_size
    )
    _check_parameters(M, ("dW", dW), ("W", W), ("db", db), ("b", b))
    wanted = _shapes(M)
    for name, tensors in {"H_g": H_g, "H_a": H_a, "P": P, "work": work}.items():
        checks.shapes(name, tensors, wanted[name])


def _in_tf32(call: Call) -> bool:
    P = call["P"]
    if not P or P[0].dtype is not torch.float32:
        return False
    return environment.float32_matmul_precision(P[0].device) != "highest"


def _in_tiles(call: Call) -> bool:
    P = call["P"]
    tiles = any(p.untyped_storage().nbytes() > p.nbytes for p in P)  # of larger matrices
    return (tiles and P[0].dtype is torch.float32) or _in_tf32(call)


# On an H100, the MNIST autoencoder's directions in TF32: 0.16 ms, and 0.25 of cuBLAS's products; in
# blocks of 256, in fp32: 0.15 in two launches, and 0.33 in 51 of cuBLAS's.
prefer("kron_precondition_", "triton", _in_tiles)
prefer("kron_step_", "triton", _in_tf32)


def _shapes(M: Tensors) -> dict[str, list[tuple[int, int]]]:
    """Of what goes with the momentum M of every layer."""
    sizes = [(n_g, n_a) for n_g, n_a in (m.shape for m in M)]
    left, right = [(n_g, n_g) for n_g, _ in sizes], [(n_a, n_a) for _, n_a in sizes]
    return {"P": sizes, "work": sizes, "H_g": left, "H_a": right}


def _check_parameters(joined: Tensors, *named: tuple[str, Tensors]) -> None:
    """Weights are n_g x d_in and biases n_g or empty, with n_a = d_in + (1 with a bias)."""
    biases = next(tensors for name, tensors in named if name == "b")
    sizes = [(*m.shape, int(b.numel() > 0)) for m, b in zip(joined, biases, strict=True)]
    weights, vectors = [(g, a - k) for g, a, k in sizes], [(g * k,) for g, _, k in sizes]
    for name, tensors in named:
        checks.shapes(name, tensors, weights if name in ("W", "dW") else vectors)
