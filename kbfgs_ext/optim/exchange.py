"""What processes that train together tell each other: one all-reduce of one flat vector.

It is of float64, the same in every exchange:

    kind, step, failed, weight, loss, slope
    per layer       rows, blind (seen, but without a bias gradient)
    per parameter   whether the pass has left it a gradient
    per parameter   the square of its gradient's norm, where it is sharded
    per block       squares (see `Exchange`), of the blocks of the activation sides
    per layer       a_bar (n_a), g_bar (n_g), y = A s (n_a)

Ranks that share the work (owners.py) send s in the place of y before that, and those whose weights
are sharded the change of h in the place of g_bar after it.

A rank that fails takes part in the exchange that comes next with ``failed`` set, and all raise.
Where the others wait for something else, for gradients or P that will not come, it leaves a note in
the store that all processes have: their own error, at the group's timeout, is raised with it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.factors import Tensors
from kbfgs_ext.optim.process import Alone

FIRST, SECOND, ACTION, WARM, ASK, CHANGE = range(1, 7)  # kinds of exchanges
KIND, STEP, FAILED, WEIGHT, LOSS, SLOPE, HEAD = range(7)


class RankError(RuntimeError):
    """Another rank has failed, or is somewhere else."""


class Exchange(Alone):
    """The processes of ``group``, and the vector that they sum.

    ``squares`` of a block are the mean square of its inputs in the first exchange of a step, and
    the trace of its A, but for the bias, in the one that carries y.

    Args:
        group: of `torch.distributed`.
        wrappers: the `DistributedDataParallel` that the closure runs.
        device: of the covered layers.
    """

    alone = False
    sharded = False  # a rank has but parts of the parameters
    # By the group's name: a note is for one optimizer. None is wiped as another rank, made later,
    # would wipe what a faster one has written.
    _made: ClassVar[Counter[str]] = Counter()

    def __init__(self, group: Any, wrappers: Sequence[DDP], device: torch.device) -> None:
        super().__init__(wrappers)
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._weight = 1.0  # of this rank
        self._kind = 0  # of the last exchange of this step
        self._layers: list[CoveredLayer] = []
        self._parameters: Tensors = []
        self._moved: set[int] = set()  # of them, those that this rank has a gradient of
        self._number = 0
        self._passed = False  # a backward of this pass has gone through DDP
        self._busy = False  # the others wait for, or come to, something else than the vector
        self._apart = False  # one rank has failed, and its state may lack what the others' has
        self._made[group.group_name] += 1
        self._key = f"kbfgs_ext: who failed in {group.group_name}, {self._made[group.group_name]}"
        self._noted = False

    def _lay_out(self, layers: list[CoveredLayer], parameters: Tensors) -> None:
        """Make the vector for these."""
        self._layers, self._parameters = list(layers), list(parameters)
        blocks = [factor for layer in layers for factor in layer.activations]
        counts = [factor.count for factor in blocks]
        norms = len(parameters) if self.sharded else 0
        sizes = [HEAD, len(layers), len(layers), len(parameters), norms, sum(counts)]
        a_bars = [layer.groups * layer.n_a for layer in layers]
        sizes += [k for layer, n in zip(layers, a_bars, strict=True) for k in (n, layer.n_g, n)]
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.vector = torch.zeros(sum(sizes), dtype=wide, device=self.device)
        _, _, _, _, self._norms, squares, *vectors = self.vector.split(sizes)
        self._a, self._g, y = vectors[0::3], vectors[1::3], vectors[2::3]
        self._told = sum(sizes[:4])  # what the host looks at
        # By the block.
        places = [v for layer, v in zip(layers, y, strict=True) for _ in layer.activations]
        self._y = {id(f): f.of(v) for f, v in zip(blocks, places, strict=True)}
        each = zip(blocks, squares.split(counts), strict=True)
        self._squares = {id(f): v.view(f.stack) for f, v in each}

    def _exchange(self, kind: int, rows: Sequence[float], blind: Sequence[bool]) -> list[float]:
        """Sum the vector over the ranks; its sums of numbers, on the host. RankError if not all
        ranks are here, or one has failed."""
        moves = [float(id(p) in self._moved) for p in self._parameters]
        head, counts = [kind, self._number, 0.0, self._weight], [*rows, *map(float, blind), *moves]
        for place, numbers in (slice(LOSS), head), (slice(HEAD, self._told), counts):
            self.vector[place] = torch.tensor(numbers, dtype=self.vector.dtype, device="cpu")
        self._kind = kind
        try:
            with torch.profiler.record_function("kbfgs_ext: exchange"):
                dist.all_reduce(self.vector, group=self.group)
        except RuntimeError as error:
            raise RankError(
                self._note()
                or f"rank {self.rank} waits for the others in step {self._number}, and not all of"
                f" them come: one has ended, or hangs. {error}"
            ) from error
        said = self.vector[: self._told].tolist()
        if said[FAILED]:
            self._apart = True
            raise RankError(self._failures(None))
        if said[KIND] != kind * self.size or said[STEP] != self._number * self.size:
            raise RankError(
                self._note()
                or f"the ranks are not in the same place: this one, rank {self.rank}, is in step"
                f" {self._number}. All ranks make the same calls, and load the same checkpoint"
            )
        if self._noted:
            self._leave("")
        if kind in (SECOND, CHANGE, ACTION):
            self._expect(kind == SECOND and self.sharded)
        return said

    def _expect(self, more: bool) -> None:
        """``more``: this step has another exchange; else the others go on to the next first pass,
        in which DDP or FSDP exchange something before."""
        self._busy = not more and (self.sharded or bool(self.wrappers))

    def fail(self, error: BaseException, inside: bool = False) -> None:
        """Tell the others, in the exchange that they wait in or come to, or by a note. RankError if
        it is another rank that has failed, of which this ``error`` follows."""
        if not isinstance(error, Exception) or isinstance(error, RankError) or not self._layers:
            return
        said = self._note()
        if said:
            raise RankError(said) from error
        gathers = self.sharded or (bool(self.wrappers) and inside)
        if self._busy or (gathers and not self._passed):
            self._leave(f"rank {self.rank} failed with {type(error).__name__}: {error}")
            return
        # If they do not come, what has happened here says more than that.
        with contextlib.suppress(Exception):
            self.vector.zero_()
            self.vector[FAILED] = 1.0
            dist.all_reduce(self.vector, group=self.group)
            self._apart = True
            self._failures(f"{type(error).__name__}: {error}")

    def _leave(self, note: str) -> None:
        self._noted = bool(note)
        with contextlib.suppress(Exception):  # without a store they learn no more than that
            dist.distributed_c10d._get_default_store().set(self._key, note)

    def _note(self) -> str:
        """Of another rank's; empty where there is none."""
        with contextlib.suppress(Exception):
            store = dist.distributed_c10d._get_default_store()
            if not self._noted and store.check([self._key]):
                return store.get(self._key).decode()
        return ""

    def _failures(self, own: str | None) -> str:
        said: list[str | None] = [None] * self.size
        dist.all_gather_object(said, own, group=self.group)
        return "; ".join(f"rank {r} failed with {s}" for r, s in enumerate(said) if s is not None)

    def synced(self) -> None:
        self._passed |= all(wrapper.require_backward_grad_sync for wrapper in self.wrappers)
