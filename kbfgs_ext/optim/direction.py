"""The direction: from the gradients to P, and along it. Steps 2 and 4 of docs/algorithm.md."""

from __future__ import annotations

import itertools

import torch

from kbfgs_ext import ops
from kbfgs_ext.ops.spectral import COEFFICIENTS, SHIFTS, WEIGHTS, only_value
from kbfgs_ext.optim.factors import ActivationMatrix, Tensors
from kbfgs_ext.optim.parts import MOVED, TURNED, Lengths, Part
from kbfgs_ext.optim.settings import Settings


class Direction:
    """P = H_g M H_a, the paper's, or with direction="spectral" the polar factor of M H_a, of H_g M
    where a layer has more outputs than inputs: its singular values are all 1. ``step_length`` says
    how far a layer goes along it."""

    def __init__(self, settings: Settings, shared: bool = False) -> None:
        self._step_length, self._nesterov = settings.step_length, settings.nesterov
        self._spectral, self._fused = settings.direction == "spectral", settings.fused
        self._fused = self._fused and not shared  # P is handed out before it is gone

    def aim(self, part: Part, scratch: Tensors, ok: torch.Tensor) -> None:
        """M and P of a step, and where one op does all, the weights. ``scratch`` is flat, and the
        same for all layers on the CPU."""
        dW, db, W, b, decay = part.given()
        M, momentum = part["M"], part.group["momentum"]
        work = part.products(scratch)
        if self._fused and part.g.has("H_g") and part.plain and not part.bare:
            ops.kron_step_(
                W=W,
                b=b,
                M=M,
                P=part["P"],
                work=work,
                dW=dW,
                db=db,
                H_g=part.g["H_g"],
                H_a=part.a["H_a"],
                step_size=[part.scalars.step_size] * len(W),
                momentum=momentum,
                weight_decay=decay,
                ok=ok,
                backend=part.backend,
            )
            part.stage = MOVED
            return
        gradient = (dW, db, W, b, momentum, decay, ok, part.backend)
        ops.momentum_(M, *gradient)
        part.stage = TURNED
        if self._nesterov:
            torch._foreach_copy_(part["ahead"], M)
            M = part["ahead"]
            ops.momentum_(M, *gradient)
        if part.bare:
            torch._foreach_copy_(part["P"], M)
        elif self._spectral:
            self.precondition(part, M, work)
        else:
            part.gradient.precondition(part, M, work)
        if self._spectral:
            self._flatten(part, scratch)

    def precondition(self, part: Part, M: Tensors, work: Tensors) -> None:
        """By the factor of the longer side: in a polar factor every direction of the shorter side
        has length 1, whatever that side's factor makes of it."""
        for some, tall in ((part.wide, False), (part.tall, True)):
            if some is None:
                continue
            mine = [layer.tall == tall for layer in part.layers]
            own_M, own_work = (list(itertools.compress(t, mine)) for t in (M, work))
            if tall:
                part.gradient.precondition_rows(some, own_M, own_work)
            else:
                ActivationMatrix.precondition_columns(some, own_M, own_work)

    def move(self, part: Part, ok: torch.Tensor) -> None:
        """The weights, or the rows of them that are here."""
        here = part.here
        if here is not None and part.stage != MOVED:
            both = zip(self._sizes(part), part.layers, strict=True)
            sizes = [size for size, layer in both if layer.rows]
            ops.descend_(here.W(), here.b(), here["saved"], sizes, ok, part.backend)
        part.stage = MOVED
        if here is None:
            return
        if here.halved:
            for layer in here.layers:
                layer.hold()
        here.written()

    def _flatten(self, part: Part, scratch: Tensors) -> None:
        """P to its polar factor: by the inverses that a CPU is better at, or by products alone."""
        inverses = part["P"][0].is_cpu
        coefficients, shifts = (WEIGHTS, SHIFTS) if inverses else (COEFFICIENTS, None)
        P, work = part.matrices(part["P"]), part.polar_scratch(scratch)
        if P:
            ops.polar_(P, work, coefficients, shifts=shifts, backend=part.backend)
        for rows in [p for layer, p in zip(part.layers, part["P"], strict=True) if layer.rowwise]:
            wide = part.scalars.step_size.dtype
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide)
            norms.clamp_(min=torch.finfo(rows.dtype).tiny)
            rows.mul_(norms.reciprocal_().mul_(only_value(coefficients, shifts)))

    def _sizes(self, part: Part) -> Tensors:
        """What each layer's P is multiplied by; that of one in groups is multiplied already."""
        size = part.scalars.step_size
        sizes = [size] * len(part.layers)
        if self._step_length != "direction":
            lengths, shared = part.lengths(), self._step_length == "balanced"
            sharded = part.layers[0].shard is not None
            norms = torch.cat(part["norms"]) if sharded else lengths_of(part.by_group(part["P"]))
            ops.lengths_([lengths.whole], [norms], [lengths.roots], [size], shared, part.backend)
            sizes = lengths.each if part.plain else _scaled(part, lengths)
        scaled = self._spectral or self._step_length == "layer"  # what gamma is lost in
        if part.g.has("gamma") and not part.bare and not scaled:  # a layer's blocks have the same
            gamma = [layer.gradients[0].blocks("gamma")[0] for layer in part.layers]
            sizes = list(torch._foreach_mul(sizes, gamma))
        return sizes


def lengths_of(matrices: Tensors) -> torch.Tensor:
    """Their Frobenius norms."""
    return torch.stack(torch._foreach_norm(matrices))


def _scaled(part: Part, lengths: Lengths) -> Tensors:
    """Multiply the P of layers in groups; returns what is left to multiply by."""
    left = []
    for layer, size in zip(part.layers, lengths.each, strict=True):
        if size.dim() and layer.shard is None:
            layer["P"].view(len(size), -1).mul_(size[:, None])
        elif size.dim():
            pairs = zip(layer.outputs_here(layer["saved"]), layer.inputs_here(size), strict=True)
            for rows, own in pairs:
                rows.mul_(own)
        left.append(lengths.one if size.dim() else size)
    return left


def slope(part: Part) -> None:
    """(13) The change of the loss that the gradient promises for the step just taken, by rows."""
    here = part.here
    if here is None:
        return
    ops.slope_(
        slope=here["slope"],
        W=here.W(),
        b=here.b(),
        saved=here["saved"],
        dW=here.dW(),
        db=here.db(),
        backend=here.backend,
    )


def output_change(part: Part) -> None:
    """(15) Step 6's h_bar+ - h_bar, without the difference of two large means."""
    here = part.here
    if here is None:
        return
    ops.output_change_(
        change=here.outputs(here["h_change_here"]),
        W=here.outputs(here.W()),
        b=here.outputs(here.b()),
        saved=here.outputs(here["saved"]),
        a_bar=here.to_outputs(here["a_bar"]),
        a_bar_next=here.to_outputs(here["a_bar_next"]),
        backend=here.backend,
    )


def undo(part: Part, where: torch.Tensor) -> None:
    """Put the parameters of before the step back where ``where``."""
    here = part.here
    if here is not None:
        ops.restore_(here.W(), here.b(), here["saved"], where, here.backend)
        here.written()
