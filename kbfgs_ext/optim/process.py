"""One process, and what `DistributedDataParallel` around a model means to a step.

`Alone` is what a `Step` asks wherever several processes would exchange numbers; it does then what
one process does. distributed.py has the other case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from kbfgs_ext.optim.factors import ActivationMatrix, Tensors
from kbfgs_ext.optim.updates import Verdict

if TYPE_CHECKING:
    from kbfgs_ext.optim.covered import CoveredLayer
    from kbfgs_ext.optim.parts import Part


class Alone:
    """One process: nothing to exchange.

    Args:
        wrappers: the `DistributedDataParallel` that the closure runs; of one process, if any.
    """

    alone = True
    shares = False  # every layer has one rank that makes its P and keeps its factors
    rank, size = 0, 1
    piece: int | None = None  # elements of P, from which on parts are handed out by themselves

    def __init__(self, wrappers: Sequence[DDP] = ()) -> None:
        self.wrappers = list(wrappers)
        self.together = True  # every rank's A is the A of all

    def meet(self, wrapper: DDP) -> None:
        """A covered layer runs inside ``wrapper``, of which nobody has said anything."""
        if dist.get_world_size(wrapper.process_group) > 1:
            raise RuntimeError(
                "the closure runs the model under DistributedDataParallel, but the optimizer was"
                " made of the bare module, so every rank would go its own way: make it of the"
                " wrapped model, KBFGS(ddp_model), or give process_group="
            )
        self.wrappers.append(wrapper)

    @property
    def marks_use(self) -> bool:
        """Whether DDP notes, also in a second pass, which parameters have had a gradient, and asks
        for that of the next first pass: then virtual biases stand in for all real ones."""
        return any(w.find_unused_parameters and not w.static_graph for w in self.wrappers)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Context of a second pass: DDP neither averages gradients nor sends buffers."""
        with contextlib.ExitStack() as stack:
            for wrapper in self.wrappers:
                stack.enter_context(wrapper.no_sync())
                stack.callback(setattr, wrapper, *_flag(wrapper))
                wrapper.require_forward_param_sync = False
            yield

    def take(self, layers: list[CoveredLayer]) -> None:
        """Say which of the ``layers`` are whose."""

    def explain(self) -> str:
        """Who does what, in a line; empty where there is nothing to say."""
        return ""

    # What a step does; its order stands in step.py.

    def begin(self, layers: list[CoveredLayer], parameters: Tensors, number: int) -> None:
        """A first pass begins."""

    def synced(self) -> None:
        """A backward of the first pass has ended."""

    def fail(self, error: BaseException, inside: bool = False) -> None:
        """This process raises ``error`` next; it comes from ``inside`` the first pass."""

    def first(self, loss: torch.Tensor) -> torch.Tensor:
        """After the first pass: means and gradients of all ranks; returns their loss."""
        return loss

    def second(
        self, paired: list[CoveredLayer], loss: torch.Tensor, slope: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """After the second pass, likewise; ``paired`` are the layers that yield a pair, and
        ``slope`` is that along what has moved here."""
        return loss, slope

    def gradient_norms(self, parameters: Tensors) -> torch.Tensor | None:
        """Of the whole gradients, where this process has but parts of them."""
        return None

    def collect(self, parts: list[Part]) -> None:
        """Before the direction: gradients go where P is made."""

    def hand_out(self, part: Part) -> None:
        """After that of ``part``: P may go where weights move."""

    def handed_out(self, parts: list[Part]) -> None:
        """After that of all ``parts``: P is there."""

    def changed(self, parts: list[Part]) -> None:
        """After step 6's change of the outputs: it goes where the factors are."""

    def norms(self, part: Part) -> tuple[Tensors, list[float]]:
        """Of the inputs of this step, by the blocks of the activation side, and of how many
        elements."""
        pairs = zip(part.inputs(), part.a.factors, strict=True)
        X = part.a.split([x.of_the_same_square(factor["a_bar"]) for x, factor in pairs])
        norms = torch._foreach_norm(X, 2, torch.promote_types(X[0].dtype, torch.float32))
        return list(norms), [float(x.numel()) for x in X]

    def average(self, layer: CoveredLayer, decay: float | None, ok: torch.Tensor) -> None:
        """Step 3 before the layer's start: `ActivationMatrix.average_one`."""
        for factor, inputs in zip(layer.activations, layer.inputs(), strict=True):
            factor.average_one(factor["a_bar"], inputs, decay, ok)

    def average_in(self, part: Part, ok: torch.Tensor) -> None:
        """Step 3: `ActivationMatrix.average_in`."""
        ActivationMatrix.average_in(part, ok)

    def follow(self, parts: list[Part], verdict: Verdict, late: bool) -> None:
        """Step 9 while the inputs are there, unless it comes ``late``, with steps 6 to 8."""
        for part in () if late else parts:
            ActivationMatrix.follow(part, verdict)

    def followed(self, verdict: Verdict) -> None:
        """What is left to do of step 9."""

    def warm(self, layers: list[CoveredLayer], bad: bool, batches: int) -> tuple[bool, int]:
        """After the batches of a warm start: whether one was bad, and how many there were."""
        return bad, batches

    def broadcast(self, parameters: Sequence[torch.Tensor]) -> None:
        """Give all ranks the parameters of rank 0, as DDP does for its own."""

    def about(self) -> dict[str, list[int]]:
        """What a checkpoint must say if it holds this rank's A_r, and not the A of all."""
        return {} if self.together else {"share": [self.rank, self.size]}

    def check_share(self, share: list[int] | None) -> None:
        """Raise ValueError if a checkpoint's A is another rank's."""
        if share not in (None, [self.rank, self.size]):
            raise ValueError(
                f"state_dict holds the share that rank {share[0]} of {share[1]} has of A, and this"
                f" is rank {self.rank} of {self.size}: call optimizer.consolidate() on all ranks"
                " before one of them saves, or let every rank save and load its own"
            )

    def consolidate(self, layers: list[CoveredLayer]) -> None:
        """Make A that of all ranks; all call it."""


def _flag(wrapper: DDP) -> tuple[str, bool]:
    return "require_forward_param_sync", wrapper.require_forward_param_sync
