"""The second pass must see the first one's world: same random numbers, same buffers, other weights.

`SecondPass` is a context manager around the second run of the closure. Inside it the random
generators stand where they stood before the first pass, and parameters want no gradient, but for
the biases of covered layers, real or virtual: theirs is all that the second pass is for, and they
are where its graph starts. On leaving, buffers (BatchNorm statistics) are as the first pass left
them, and every parameter has its requires_grad and its first-pass gradient again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kbfgs_ext.ops import registry

LARGE_BUFFER = 2**16  # elements: below, a copy costs no more than the launch that makes it


class RandomState:
    """The state of the random generators that a pass may draw from: CPU, a CUDA device's, and the
    user's own ``generators``.

    A capture has no state to read: graph.py sees to it that nothing is drawn in one.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self._cpu = torch.get_rng_state()
        readable = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        self._cuda = torch.cuda.get_rng_state(device) if readable else None
        self._device = device
        self._own = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        for generator, state in self._own:
            generator.set_state(state)


class Buffers:
    """Copies of a model's buffers, kept from step to step.

    Small ones are all copied: BatchNorm's kernels write the running statistics without a trace in
    the tensor's version. A large one (a mask, a table of positions) is copied if its version shows
    that the first pass has written it, which the second then does as well. One that cannot be
    written, expanded or made in inference mode, needs no copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}  # large ones, by id
        self._saved: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor | None]] = []

    def _all(self) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        for module in modules_of(self._model):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield module, name, buffer

    def watch(self) -> None:
        """Note the versions of the large ones, before the first pass."""
        self._versions = {
            id(b): (b, b._version) for _, _, b in self._all() if not _small(b) and _writable(b)
        }

    def save(self) -> None:
        """Copy every buffer that a pass may write."""
        kept = {id(buffer): copy for _, _, buffer, copy in self._saved}
        self._saved = []
        for module, name, buffer in self._all():
            before = self._versions.get(id(buffer))
            quiet = before is not None and before[0] is buffer and before[1] == buffer._version
            copy = None
            if _writable(buffer) and not quiet:
                copy = kept.get(id(buffer))
                if copy is None or copy.shape != buffer.shape or copy.dtype != buffer.dtype:
                    copy = buffer.clone()
                else:
                    copy.copy_(buffer)
            self._saved.append((module, name, buffer, copy))

    def copies(self) -> list[torch.Tensor]:
        """The copies as they stand."""
        return [copy for *_, copy in self._saved if copy is not None]

    def bytes(self) -> int:
        """Bytes of the copies: of all small buffers, and of the large ones that are copied now."""
        copied = {id(b) for _, _, b, copy in self._saved if copy is not None}
        mine = {id(b): b for _, _, b in self._all() if _writable(b)}.values()
        return sum(b.numel() * b.element_size() for b in mine if _small(b) or id(b) in copied)

    def restore(self) -> None:
        """Put every buffer back as `save` found it, replaced ones too."""
        for module, name, buffer, copy in self._saved:
            if copy is not None:
                buffer.copy_(copy)
            module._buffers[name] = buffer


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of ``model``, once each, in no order; torch's own way makes names for them."""
    seen, waiting = set(), [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            waiting.extend(child for child in module._modules.values() if child is not None)
            yield module


def parameters_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """All parameters of ``model``, tied ones perhaps more than once."""
    for module in modules_of(model):
        for p in module._parameters.values():
            if p is not None:
                yield p


def _small(buffer: torch.Tensor) -> bool:
    return buffer.numel() <= LARGE_BUFFER


def _writable(buffer: torch.Tensor) -> bool:
    """Whether a pass can write it in place: no tensor of inference mode, no elements that share a
    place in memory."""
    if buffer.is_inference():
        return False
    strides = buffer.stride() if buffer.layout is torch.strided else ()
    return not any(n > 1 and step == 0 for n, step in zip(buffer.shape, strides, strict=False))


def joined(model: nn.Module, given: nn.Module | Iterable[nn.Module] | None) -> nn.Module:
    """The modules that a closure runs: ``model`` with those ``given``."""
    if given is None:
        return model
    given = [given] if isinstance(given, nn.Module) else list(given)
    for one in given:
        if not isinstance(one, nn.Module):
            raise TypeError(f"context must be a torch.nn.Module, got {type(one).__name__}")
    return nn.ModuleList([model, *given])


def check_generators(given: Iterable[torch.Generator]) -> list[torch.Generator]:
    """``given`` as a list; TypeError where one is no `torch.Generator`."""
    generators = list(given)
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generators must be torch.Generators, got {type(one).__name__}")
    return generators


class SecondPass:
    """Context of the second run of the closure; see the head of this file."""

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        anchors: Iterable[torch.Tensor],
        random: RandomState,
        buffers: Buffers,
        freeze: bool,
    ) -> None:
        self._parameters = once(parameters)
        self._anchors = {id(p) for p in anchors}
        self._random = random
        self._buffers = buffers
        self._freeze = freeze

    def __enter__(self) -> None:
        self._buffers.save()
        self._gradients = [p.grad for p in self._parameters]
        self._frozen: list[torch.Tensor] = []
        try:
            for p in self._parameters:
                p.grad = None
                if self._freeze and p.requires_grad and id(p) not in self._anchors:
                    self._frozen.append(p)
                    p.requires_grad_(False)
            self._random.restore()
        except BaseException:
            self._thaw()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        empty = all(p.grad is None for p in self._parameters)
        self._thaw()
        self._buffers.restore()
        if self._freeze and error is not None and _misses_weight_gradients(error, empty):
            raise RuntimeError(
                "the closure failed in the second pass, in which weights have no gradient: if it"
                " reads, assigns or differentiates weight gradients, make the optimizer with"
                " factors=FactorRule(freeze_second_pass=False). It failed with"
                f" {type(error).__name__}: {error}"
            ) from error

    def _thaw(self) -> None:
        """Parameters want their gradients again, and have those of the first pass."""
        for p in self._frozen:
            p.requires_grad_(True)
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient


def _misses_weight_gradients(error: BaseException, empty: bool) -> bool:
    """Whether the error may come from a weight that wants no gradient, from a `.grad` of None, or,
    where no parameter has one (``empty``), from a list of those that there are."""
    said = str(error)
    if empty and isinstance(error, (RuntimeError, ValueError)) and "empty" in said:
        return True
    if isinstance(error, (AttributeError, TypeError)):
        return "NoneType" in said
    asked = ("does not require grad", "not to require grad", "requires_grad=False", "NoneType")
    return isinstance(error, RuntimeError) and any(part in said for part in asked)


def once(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Each of ``tensors`` once, in their order: several layers may be parts of a parameter."""
    return list({id(t): t for t in tensors}.values())


@contextlib.contextmanager
def own_work(
    device: torch.device, matmul_precision: str | None, trace: dict[str, registry.Taken]
) -> Iterator[None]:
    """Context of the optimizer's own work: no graph, no autocast, its own precision of products;
    ``trace`` notes which backend each op takes.

    Autocast keeps 16-bit copies of the weights while it is on; they are void afterwards.
    """
    with contextlib.ExitStack() as stack:
        if matmul_precision:
            stack.enter_context(_products(matmul_precision))
        stack.enter_context(torch.no_grad())
        if _autocasts(device):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(registry.watch(trace))
        yield


def _autocasts(device: torch.device) -> bool:
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextlib.contextmanager
def _products(precision: str) -> Iterator[None]:
    """Context: float32 products have ``precision``, in the words of
    `torch.set_float32_matmul_precision`, whichever of torch's two settings was used before."""
    backends: Any = torch.backends
    places = backends.cuda.matmul, backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # the backends have settings of their own, that contradict it
        old = ""
    torch.set_float32_matmul_precision(precision)  # sets both
    try:
        yield
    finally:
        if old:
            torch.set_float32_matmul_precision(old)
        else:
            for place, setting in zip(places, before, strict=True):
                place.fp32_precision = setting


def profiled(phase: str) -> contextlib.AbstractContextManager[Any]:
    """A range with the phase's name, where a profiler is at work."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"kbfgs_ext: {phase}")
    return contextlib.nullcontext()
