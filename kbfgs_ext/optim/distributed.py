"""Several processes: a step of r ranks is the step of one process on the batches of all of them.

The objective is the mean over the ranks of what their closures return, with weights w_r that are
equal, or the rows that the ranks have (``mean_over``). All that a step is made of follows from
sums of vectors (m_r rows on rank r, m of all ranks together):

    a_bar = sum m_r a_bar_r / m              g_bar, loss = sum w_r (g_bar_r, loss_r) / sum w_r
    A s   = sum m_r/m X~_r'(X~_r s)/m_r      or sum A_r s / r, where every rank keeps its own A_r

so no matrix is sent but the gradients, which `DistributedDataParallel` averages already, and A_0,
once. Every decision is taken from these numbers, which are the same on all ranks to the bit.

exchange.py has the vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.exchange import (
    ACTION,
    CHANGE,
    FIRST,
    HEAD,
    LOSS,
    SECOND,
    WARM,
    WEIGHT,
    Exchange,
)
from kbfgs_ext.optim.factors import ActivationMatrix, Tensors, times
from kbfgs_ext.optim.inputs import mean_square
from kbfgs_ext.optim.parts import Part, of_mine
from kbfgs_ext.optim.sharing import Shares
from kbfgs_ext.optim.updates import Verdict

CHUNK = 2**24  # elements of gradients that are sent together


class Ranks(Exchange):
    """The processes of ``group``.

    Args:
        group: of `torch.distributed`.
        wrappers: the `DistributedDataParallel` that the closure runs: their gradients are averaged.
        mean_over: "ranks" or "rows": what the objective is the mean over.
        device: of the covered layers.
    """

    def __init__(
        self, group: Any, wrappers: Sequence[DDP], mean_over: str, device: torch.device
    ) -> None:
        super().__init__(group, wrappers, device)
        self.twins = group  # the ranks that keep the same factors as this one, if there are any
        self._by_rows = mean_over == "rows"
        self._all_weights = float(self.size)
        self._rows: dict[int, tuple[int, float]] = {}  # by layer: here, and on all ranks
        self._asked: list[Part] = []  # of which step 9 is half done: y is in the vector
        self._s: dict[int, torch.Tensor] = {}  # theirs, by the block
        self._taken: list[CoveredLayer] = []  # of all groups
        self._more = False  # this step has another exchange
        self._mark([])

    def meet(self, wrapper: DDP) -> None:
        """Take in a wrapper that the closure turns out to run."""
        if self._by_rows or dist.get_world_size(wrapper.process_group) != self.size:
            raise RuntimeError(
                "the closure runs the model under DistributedDataParallel, which averages over"
                " the ranks of its own group: make the optimizer with that group, and with"
                ' mean_over="ranks"'
            )
        self.wrappers.append(wrapper)
        self._mark(self._layers)

    def _mark(self, layers: list[CoveredLayer]) -> None:
        """Note what DDP averages."""
        self._averaged = {
            id(p)
            for wrapper in self.wrappers
            for name, p in wrapper.module.named_parameters()
            if name not in wrapper.parameters_to_ignore
        }
        for layer in layers:
            layer.observer.averaged = id(layer.bias) in self._averaged

    def take(self, layers: list[CoveredLayer]) -> None:
        self._taken += layers

    def _shares(self) -> Shares:
        return Shares.of(self._taken, self.size)

    def explain(self) -> str:
        return f"all {self.size} ranks do all the work; {self._shares()}"

    def broadcast(self, parameters: Sequence[torch.Tensor]) -> None:
        own = [p.detach() for p in parameters if id(p) not in self._averaged]
        self._take_first(own, self.group)

    @staticmethod
    def _take_first(tensors: Sequence[torch.Tensor], group: Any) -> None:
        """All ranks of the ``group`` get what its first has."""
        for chunk in _chunks(tensors):
            flat = _flatten_dense_tensors(chunk)
            dist.broadcast(flat, group=group, group_src=0)
            for t, value in zip(chunk, _unflatten_dense_tensors(flat, chunk), strict=True):
                t.copy_(value)

    # ------------------------------------------------------------------ the vector

    def begin(self, layers: list[CoveredLayer], parameters: Tensors, number: int) -> None:
        self._number, self._kind, self._passed, self._busy = number, 0, False, False
        self._asked = []
        self._moved.clear()
        if self._apart and self.twins is not None:
            own = [t for x in layers for name, t in x.kept.items() if name.split(".")[0] != "A"]
            self._take_first(own, self.twins)
        self._apart = False
        if (len(layers), len(parameters)) == (len(self._layers), len(self._parameters)):
            return
        self._lay_out(layers, parameters)
        self._mark(layers)

    # ------------------------------------------------------------------ the two passes

    def first(self, loss: torch.Tensor) -> torch.Tensor:
        layers = self._layers
        for layer in layers:
            if not layer.moving:
                layer.observer.settle()
        here = [sum(use.rows for use in layer.observer.uses) for layer in layers]
        self.vector.zero_()
        self._look_at_inputs(here)
        self._look_at_gradients()
        self._weight = float(max(here)) if self._by_rows else 1.0
        covered = {id(p) for layer in layers for p in layer.parameters()}
        self._moved = {id(p) for layer in layers for p in layer.moving}
        self._moved |= {
            id(p) for p in self._parameters if id(p) not in covered and p.grad is not None
        }
        wanted = [
            layer.observer.keep_inputs or layer.observer.a_bar is not None for layer in layers
        ]
        loss, said = self._reduce(FIRST, "", here, wanted, loss)
        self._rows = {
            id(layer): (rows, total)
            for layer, rows, total in zip(layers, here, said[HEAD:], strict=False)
        }
        moves = said[HEAD + 2 * len(layers) :]
        moved = [p for p, n in zip(self._parameters, moves, strict=True) if n]
        self._average_gradients(moved)
        known = {id(p) for p in moved}
        for layer in layers:
            layer.moving = [p for p in layer.parameters() if id(p) in known]
            layer.bare = not layer.started and not layer.observer.seen
        self._look_ahead()
        return loss

    def _look_ahead(self) -> None:
        """What the others come to after a first exchange."""
        active = [layer for layer in self._layers if layer.moving]
        paired = any(layer.observer.a_bar is not None for layer in active)
        self._more = paired or any(layer.observer.has_inputs() for layer in active)
        self._expect(self._more)
        self._busy |= self.shares or not all(layer.started for layer in active)  # P, A_0

    def handed_out(self, parts: list[Part]) -> None:
        self._expect(self._more)

    def second(
        self, paired: list[CoveredLayer], loss: torch.Tensor, slope: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        known = {id(layer) for layer in paired}
        wanted = [id(layer) in known for layer in self._layers]
        here = [
            sum(use.rows for use in layer.observer.uses) if yields else 0
            for layer, yields in zip(self._layers, wanted, strict=True)
        ]
        return self._reduce(SECOND, "_next", here, wanted, loss)[0], slope

    def _look_at_gradients(self) -> None:
        """Put what the first exchange has of the gradients into the vector."""

    def _look_at_inputs(self, here: list[int]) -> None:
        """a_bar and mean squares of the layers whose inputs are kept."""
        for rows, layer in zip(here, self._layers, strict=True):
            kept = layer.observer.keep_inputs and layer.observer.uses
            blocks = zip(layer.activations, layer.inputs() if kept else (), strict=False)
            for factor, inputs in blocks:
                settings, a_bar = factor.settings, factor["a_bar"]
                inputs.average([], a_bar, 0.0, None, settings.backend)
                if settings.relative_damping:
                    self._squares[id(factor)].copy_(rows * mean_square(inputs, a_bar))

    def _reduce(
        self, kind: int, suffix: str, rows: list[int], wanted: list[bool], loss: torch.Tensor
    ) -> tuple[torch.Tensor, list[float]]:
        """The means of a pass over all ranks, in their places; returns the loss and the sums."""
        layers, weight = self._layers, self._weight
        self.vector[LOSS] = 0.0
        torch._foreach_zero_([*self._a, *self._g])
        a = {i: layers[i]["a_bar" + suffix] for i, n in enumerate(wanted) if n}
        g = [layer["g_bar" + suffix] for layer in layers]
        for i in [i for i in a if rows[i]]:
            self._a[i].copy_(a[i]).mul_(rows[i])
        if weight:  # without rows even a loss of NaN is of no account
            self.vector[LOSS] = loss * weight
            torch._foreach_copy_(self._g, g)
            torch._foreach_mul_(self._g, weight)
        blind = [layer.observer.seen and not layer.observer.filled for layer in layers]
        said = self._exchange(kind, rows, blind)
        total = self._all_weights = said[WEIGHT] or math.nan
        totals, blinds = said[HEAD : HEAD + len(layers)], said[HEAD + len(layers) :]
        shown = [i for i in a if totals[i]]
        for i in shown:
            a[i].copy_(self._a[i].div_(totals[i]))
        torch._foreach_div_(self._g, total)
        torch._foreach_copy_(g, self._g)
        for layer, n, unfilled in zip(layers, totals, blinds, strict=False):
            layer.observer.elsewhere = bool(n)
            layer.observer.filled = not unfilled
        return self.vector[LOSS] / total, said

    def _average_gradients(self, moved: Tensors) -> None:
        """Those that DDP has not averaged; a rank that has none adds zero."""
        own = [p for p in moved if id(p) not in self._averaged]
        for p in moved:
            if p.grad is None or (id(p) not in self._moved and id(p) not in self._averaged):
                p.grad = torch.zeros_like(p)
            elif p.grad.is_sparse and id(p) not in self._averaged:
                raise RuntimeError(
                    "a gradient is sparse: give its module sparse=False, or wrap the model in"
                    " DistributedDataParallel, which averages sparse gradients"
                )
        share = self._weight / self._all_weights  # 0: without rows
        for chunk in _chunks([p.grad for p in own if p.grad is not None]):
            flat = _flatten_dense_tensors(chunk)
            if share:
                flat.mul_(share)
            else:
                flat.zero_()
            dist.all_reduce(flat, group=self.group)
            for gradient, mean in zip(chunk, _unflatten_dense_tensors(flat, chunk), strict=True):
                gradient.copy_(mean)

    # ------------------------------------------------------------------ the activation side

    def norms(self, part: Part) -> tuple[Tensors, list[float]]:
        norms = [
            (self._squares[id(factor)] / self._rows[id(layer)][1]).sqrt()
            for layer in part.layers
            for factor in layer.activations
        ]
        return part.a.split(norms), [1.0] * len(part.a)

    def _share(self, layer: CoveredLayer) -> float:
        """m_r/m."""
        rows, total = self._rows[id(layer)]
        return rows / total if total else 0.0

    def average(self, layer: CoveredLayer, decay: float | None, ok: torch.Tensor) -> None:
        """A_0 is a sum over the ranks of matrices: once in a run."""
        if decay is None:
            return  # the warm start's
        share = self._share(layer)
        for factor, inputs in zip(layer.activations, layer.inputs() if share else (), strict=False):
            factor.average_one(torch.empty_like(factor["a_bar"]), inputs, decay, ok)
        for average in [factor.average for factor in layer.activations]:
            self._sum_average(layer, average.mul_(share) if share else average.zero_())

    def _sum_average(self, layer: CoveredLayer, average: torch.Tensor) -> None:
        dist.all_reduce(average, group=self.group)

    def average_in(self, part: Part, ok: torch.Tensor) -> None:
        """A_r <- decay*A_r + (1-decay)*w X~_r'X~_r/m_r with w = r*m_r/m, so that A is the mean of
        all A_r.

        The op knows decay' and 1 - decay' alone: what they lack to that is a factor afterwards.
        """
        if not part.settings.keep_A:
            return
        self.together = False
        decay = part.group["stat_decay"]
        for layer in part.layers:
            rows, total = self._rows[id(layer)]
            w = self.size * rows / total if total else 0.0
            c = (1 - decay) * w
            own = decay / (decay + c) if w != 1 else decay
            for factor, inputs in zip(layer.activations, layer.inputs() if w else (), strict=False):
                unused = torch.empty_like(factor["a_bar"])
                inputs.average([factor["A"]], unused, own, ok, part.backend)
            for A in [factor["A"] for factor in layer.activations] if w != 1 else ():
                A.mul_(ok.to(A.dtype).mul_(decay + c - 1).add_(1))

    def _along(self, parts: list[Part]) -> dict[int, torch.Tensor]:
        """Step 9's s = H_a a_bar, by the factor."""
        return {id(f): f.moved() for part in parts for f in part.a.factors}

    def follow(self, parts: list[Part], verdict: Verdict, late: bool) -> None:
        self._s = self._along(parts)
        self._asked = parts
        for part in parts:
            self._act(part)

    def _act(self, part: Part) -> None:
        """This rank's share of A s in step 9's y = A s + lam*s."""
        wide, everyone = self.vector.dtype, 1 / self.size
        for layer in part.layers:
            share = everyone if part.settings.keep_A else self._share(layer)
            X = layer.inputs() if share and not part.settings.keep_A else []
            for i, (factor, columns) in enumerate(
                zip(layer.activations, layer.columns(), strict=True)
            ):
                v, d_in = self._s[id(factor)], columns.stop - columns.start
                if not share:
                    self._y[id(factor)].zero_()
                    self._squares[id(factor)].zero_()
                    continue
                if part.settings.keep_A:
                    y, squares = times(factor["A"], v), factor["A"].diagonal(dim1=-2, dim2=-1)
                    trace = squares[..., :d_in].sum(-1, dtype=wide)
                else:
                    y = torch.empty_like(v)
                    X[i].action(v, y, part.backend)
                    trace = mean_square(X[i], v) * d_in
                self._y[id(factor)].copy_(y).mul_(share)
                self._squares[id(factor)].copy_(trace * share)

    def followed(self, verdict: Verdict) -> None:
        """The rest of step 9. Where no second pass has carried y, it goes by itself."""
        if not self._asked:
            return
        if self._kind not in (SECOND, CHANGE):
            self._exchange(ACTION, [0] * len(self._layers), [False] * len(self._layers))
        for part in of_mine(self._asked):
            s, y = [self._s[id(f)] for f in part.a.factors], []
            for factor, v in zip(part.a.factors, s, strict=True):
                lam = factor.damping(part.scalars.lam_a).to(v.dtype)
                y.append(self._y[id(factor)].to(v.dtype) + v * lam[..., None])
            # One row with the trace of all: tr A = |row|^2 and 1 for the bias.
            ends = [c.stop - c.start for layer in part.layers for c in layer.columns()]
            rows = [v.new_zeros(*v.shape[:-1], 1, n) for v, n in zip(s, ends, strict=True)]
            for row, factor in zip(rows, part.a.factors, strict=True):
                row[..., 0, 0] = self._squares[id(factor)].sqrt()
            ActivationMatrix.take(part, s, y, rows, verdict)
        self._asked = []

    # ------------------------------------------------------------------ starts and checkpoints

    def warm(self, layers: list[CoveredLayer], bad: bool, batches: int) -> tuple[bool, int]:
        """The average over all batches of all ranks."""
        self.vector.zero_()
        self.vector[LOSS] = batches
        here = [layer.warm_batches for layer in layers]
        said = self._exchange(WARM, here, [bad] * len(layers))
        for layer, k, total in zip(layers, here, said[HEAD:], strict=False):
            for average in [factor.average for factor in layer.activations] if total else []:
                self._sum_average(layer, average.mul_(k / total) if k else average.zero_())
                layer.warm_batches = int(total)
        return bool(said[HEAD + len(layers)]), int(said[LOSS])

    def consolidate(self, layers: list[CoveredLayer]) -> None:
        for factor in [factor for layer in layers for factor in layer.activations]:
            if "A" in factor.kept:
                dist.all_reduce(factor["A"].div_(self.size), group=self.group)
        self.together = True


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """``tensors`` by dtype, in lists of about `CHUNK` elements."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for t in tensors:
        chunk = by_dtype.setdefault(t.dtype, [])
        chunk.append(t)
        if sum(x.numel() for x in chunk) >= CHUNK:
            yield by_dtype.pop(t.dtype)
    yield from by_dtype.values()
