"""Several processes: a step of r ranks is the step of one process on the batches of all of them.

The objective is the mean over the ranks of what their closures return, with weights w_r that are
equal, or the rows that the ranks have (``mean_over``). All that a step is made of follows from
sums of vectors (m_r rows on rank r, m of all ranks together):

    a_bar = sum m_r a_bar_r / m              g_bar, loss = sum w_r (g_bar_r, loss_r) / sum w_r
    A s   = sum m_r/m X~_r'(X~_r s)/m_r      or sum A_r s / r, where every rank keeps its own A_r

so no matrix is sent but the gradients, which `DistributedDataParallel` averages already, and A_0,
once. Every decision is taken from these numbers, which are the same on all ranks to the bit.

An exchange is one all-reduce of one flat vector of float64, the same in every exchange:

    kind, step, failed, weight, loss
    per layer       rows, blind (seen, but without a bias gradient)
    per parameter   whether the pass has left it a gradient
    per block       squares (of X: the trace of A)
    per layer       a_bar (n_a), g_bar (n_g), y = A s (n_a)

A rank that fails takes part in the exchange that comes next with ``failed`` set, and all raise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext import ops
from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.factors import Tensors
from kbfgs_ext.optim.parts import Part
from kbfgs_ext.optim.process import Alone, rows_of
from kbfgs_ext.optim.updates import Verdict, restart

CHUNK = 2**24  # elements of gradients that are sent together
FIRST, SECOND, ACTION, WARM = 1, 2, 3, 4  # kinds of exchanges
KIND, STEP, FAILED, WEIGHT, LOSS, HEAD = range(6)


class RankError(RuntimeError):
    """Another rank has failed, or is somewhere else."""


class Ranks(Alone):
    """The processes of ``group``.

    Args:
        group: of `torch.distributed`.
        wrappers: the `DistributedDataParallel` that the closure runs: their gradients are averaged.
        mean_over: "ranks" or "rows": what the objective is the mean over.
        device: of the covered layers.
    """

    alone = False

    def __init__(
        self, group: Any, wrappers: Sequence[DDP], mean_over: str, device: torch.device
    ) -> None:
        super().__init__(wrappers)
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._by_rows = mean_over == "rows"
        self._weight, self._all_weights = 1.0, float(self.size)
        self._rows: dict[int, tuple[int, float]] = {}  # by layer: here, and on all ranks
        self._asked: list[tuple[Part, Tensors]] = []  # s of step 9, whose y is in the vector
        self._kind = 0  # of the last exchange of this step
        self._layers: list[CoveredLayer] = []
        self._parameters: Tensors = []
        self._moved: set[int] = set()  # of them, those that this rank has a gradient of
        self._number = 0
        self._passed = False  # a backward of this pass has gone through DDP
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
        self._by_ddp = {
            id(p)
            for wrapper in self.wrappers
            for name, p in wrapper.module.named_parameters()
            if name not in wrapper.parameters_to_ignore
        }
        for layer in layers:
            layer.observer.averaged = id(layer.bias) in self._by_ddp

    def broadcast(self, parameters: Sequence[torch.Tensor]) -> None:
        own = [p.detach() for p in parameters if id(p) not in self._by_ddp]
        for chunk in _chunks(own):
            flat = _flatten_dense_tensors(chunk)
            dist.broadcast(flat, group=self.group, group_src=0)
            for p, value in zip(chunk, _unflatten_dense_tensors(flat, chunk), strict=True):
                p.copy_(value)

    # ------------------------------------------------------------------ the vector

    def begin(self, layers: list[CoveredLayer], parameters: Tensors, number: int) -> None:
        self._number, self._kind, self._passed = number, 0, False
        self._asked.clear()
        self._moved.clear()
        if (len(layers), len(parameters)) == (len(self._layers), len(self._parameters)):
            return
        self._layers, self._parameters = list(layers), list(parameters)
        self._mark(layers)
        blocks = sum(len(layer.activations) for layer in layers)
        sizes = [HEAD, len(layers), len(layers), len(parameters), blocks]
        sizes += [n for layer in layers for n in (layer.n_a, layer.n_g, layer.n_a)]
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.vector = torch.zeros(sum(sizes), dtype=wide, device=self.device)
        _, _, _, _, squares, *vectors = self.vector.split(sizes)
        self._a, self._g, y = vectors[0::3], vectors[1::3], vectors[2::3]
        self._told = sum(sizes[:4])  # what the host looks at
        factors = [(f, v) for layer, v in zip(layers, y, strict=True) for f in layer.activations]
        self._y = {id(f): v[f.rows] for f, v in factors}
        self._squares = {id(f): v for (f, _), v in zip(factors, squares.unbind(), strict=True)}

    def _exchange(self, kind: int, rows: Sequence[float], blind: Sequence[bool]) -> list[float]:
        """Sum the vector over the ranks; its sums of numbers, on the host. RankError if not all
        ranks are here, or one has failed."""
        layers, moves = len(self._layers), [float(id(p) in self._moved) for p in self._parameters]
        head = [kind, self._number, 0.0, self._weight]
        self.vector[:LOSS].copy_(torch.tensor(head, dtype=self.vector.dtype))
        counts = torch.tensor([*rows, *map(float, blind)], dtype=self.vector.dtype)
        self.vector[HEAD : HEAD + 2 * layers].copy_(counts)
        self.vector[HEAD + 2 * layers : self._told].copy_(torch.tensor(moves))
        self._kind = kind
        try:
            with torch.profiler.record_function("kbfgs_ext: exchange"):
                dist.all_reduce(self.vector, group=self.group)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} waits for the others in step {self._number}, and not all of"
                f" them come: one has ended, or hangs. {error}"
            ) from error
        said = self.vector[: self._told].tolist()
        if said[FAILED]:
            raise RankError(self._failures(None))
        if said[KIND] != kind * self.size or said[STEP] != self._number * self.size:
            raise RankError(
                f"the ranks are not in the same place: this one, rank {self.rank}, is in step"
                f" {self._number}. All ranks make the same calls, and load the same checkpoint"
            )
        return said

    def fail(self, error: BaseException, inside: bool = False) -> None:
        """Tell the others, in the exchange that they wait in or come to. Not where they wait
        inside DDP for gradients that this rank will not send: they see it end."""
        stuck = bool(self.wrappers) and inside and not self._passed
        if stuck or not isinstance(error, Exception) or isinstance(error, RankError):
            return
        if self._layers:
            # If they do not come, what has happened here says more than that.
            with contextlib.suppress(Exception):
                self.vector.zero_()
                self.vector[FAILED] = 1.0
                dist.all_reduce(self.vector, group=self.group)
                self._failures(f"{type(error).__name__}: {error}")

    def _failures(self, own: str | None) -> str:
        said: list[str | None] = [None] * self.size
        dist.all_gather_object(said, own, group=self.group)
        return "; ".join(f"rank {r} failed with {s}" for r, s in enumerate(said) if s is not None)

    def synced(self) -> None:
        self._passed |= all(wrapper.require_backward_grad_sync for wrapper in self.wrappers)

    # ------------------------------------------------------------------ the two passes

    def first(self, loss: torch.Tensor) -> torch.Tensor:
        layers = self._layers
        for layer in layers:
            if not layer.moving:
                layer.observer.settle()
        self._means_of_inputs()
        here = [sum(use.rows for use in layer.observer.uses) for layer in layers]
        self._weight = float(max(here)) if self._by_rows else 1.0
        covered = {id(p) for layer in layers for p in layer.parameters()}
        self._moved = {id(p) for layer in layers for p in layer.moving}
        self._moved |= {
            id(p) for p in self._parameters if id(p) not in covered and p.grad is not None
        }
        wanted = [
            layer.observer.keep_inputs or layer.observer.a_bar is not None for layer in layers
        ]
        self.vector.zero_()
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
        return loss

    def second(self, paired: list[CoveredLayer], loss: torch.Tensor) -> torch.Tensor:
        known = {id(layer) for layer in paired}
        wanted = [id(layer) in known for layer in self._layers]
        here = [
            sum(use.rows for use in layer.observer.uses) if yields else 0
            for layer, yields in zip(self._layers, wanted, strict=True)
        ]
        return self._reduce(SECOND, "_next", here, wanted, loss)[0]

    def _means_of_inputs(self) -> None:
        """a_bar of the layers whose rows are kept."""
        kept = [x for x in self._layers if x.observer.keep_inputs and x.observer.uses]
        if kept:
            factors = [factor for layer in kept for factor in layer.activations]
            X, a_bar = [x for one in kept for x in rows_of(one)], [f["a_bar"] for f in factors]
            ops.factor_ema_([], a_bar, X, 0.0, None, factors[0].settings.backend)

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
        own = [p for p in moved if id(p) not in self._by_ddp]
        for p in moved:
            if p.grad is None or (id(p) not in self._moved and id(p) not in self._by_ddp):
                p.grad = torch.zeros_like(p)
            elif p.grad.is_sparse and id(p) not in self._by_ddp:
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
            dist.all_reduce(average.mul_(share) if share else average.zero_(), group=self.group)

    def average_in(self, part: Part, ok: torch.Tensor) -> None:
        """A_r <- decay*A_r + (1-decay)*w X~_r'X~_r/m_r with w = r*m_r/m, so that A is the mean of
        all A_r.

        The op knows decay' and 1 - decay' alone: what they lack to that is a factor afterwards.
        """
        if not part.settings.keep_A:
            return
        self.together = False
        decay = part.group["stat_decay"]
        alike: dict[float, list[CoveredLayer]] = {}
        for layer in part.layers:
            rows, total = self._rows[id(layer)]
            alike.setdefault(self.size * rows / total if total else 0.0, []).append(layer)
        for w, layers in alike.items():
            c, A = (1 - decay) * w, [f["A"] for layer in layers for f in layer.activations]
            own = decay if w == 1 else decay / (decay + c) if w else 1.0
            if w:
                unused = [torch.empty_like(f["a_bar"]) for x in layers for f in x.activations]
                X = [x for layer in layers for x in rows_of(layer)]
                ops.factor_ema_(A, unused, X, own, ok, part.backend)
            if w != 1:
                torch._foreach_mul_(A, ok.to(A[0].dtype).mul_(decay + c - 1).add_(1))

    def follow(self, part: Part, verdict: Verdict, late: bool) -> None:
        """Step 9's s = H_a a_bar and this rank's share of y = A s + lam*s."""
        s = [torch.mv(H_a, a) for H_a, a in zip(part.a["H_a"], part.a["a_bar"], strict=True)]
        self._asked.append((part, s))
        keep_A, lam, wide = part.settings.keep_A, part.scalars.lam_a, self.vector.dtype
        action = {id(factor): v for factor, v in zip(part.a.factors, s, strict=True)}
        here = [layer for layer in part.layers if keep_A or self._share(layer)]
        factors = [factor for layer in here for factor in layer.activations]
        v = [action[id(factor)] for factor in factors]
        y = [torch.empty_like(x) for x in v]
        if keep_A:
            for factor, out, x in zip(factors, y, v, strict=True):
                torch.mv(factor["A"], x, out=out).add_(x * lam.to(x.dtype))
            ends = [c.stop - c.start for layer in here for c in layer.columns()]
            diagonals = zip((f["A"].diagonal() for f in factors), ends, strict=True)
            squares = [diagonal[:n].sum(dtype=wide) for diagonal, n in diagonals]
        else:
            X = [x for layer in here for x in rows_of(layer)]
            ops.hessian_action_(y, X, v, [lam] * len(v), part.backend)
            squares = [torch.linalg.vector_norm(x, dtype=wide).square() / len(x) for x in X]
        shares = [1 / self.size if keep_A else self._share(x) for x in here for _ in x.activations]
        for factor, out, trace, share in zip(factors, y, squares, shares, strict=True):
            self._y[id(factor)].copy_(out).mul_(share)
            self._squares[id(factor)].copy_(trace * share)

    def followed(self, verdict: Verdict) -> None:
        """The rest of step 9. Where no second pass has carried y, it goes by itself."""
        if not self._asked:
            return
        if self._kind != SECOND:
            self._exchange(ACTION, [0] * len(self._layers), [False] * len(self._layers))
        for part, s in self._asked:
            y = [self._y[id(f)].to(v.dtype) for f, v in zip(part.a.factors, s, strict=True)]
            H_a, counts, a_bar = (part.a[name] for name in ("H_a", "counts_a", "a_bar"))
            ops.bfgs_update_(H_a, counts, s, y, [], a_bar, verdict.ok, part.backend)
            # One row with the trace of all: tr A = |row|^2 and 1 for the bias.
            ends = [c.stop - c.start for layer in part.layers for c in layer.columns()]
            rows = [a.new_zeros(1, n) for a, n in zip(a_bar, ends, strict=True)]
            for row, factor in zip(rows, part.a.factors, strict=True):
                row[0, 0] = self._squares[id(factor)].sqrt()
            restart(part, "a", verdict.order_a, rows)
        self._asked.clear()

    # ------------------------------------------------------------------ starts and checkpoints

    def warm(self, layers: list[CoveredLayer], bad: bool, batches: int) -> tuple[bool, int]:
        """The average over all batches of all ranks."""
        self.vector.zero_()
        self.vector[LOSS] = batches
        here = [layer.warm_batches for layer in layers]
        said = self._exchange(WARM, here, [bad] * len(layers))
        for layer, k, total in zip(layers, here, said[HEAD:], strict=False):
            for average in [factor.average for factor in layer.activations] if total else []:
                dist.all_reduce(average.mul_(k / total) if k else average.zero_(), group=self.group)
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
