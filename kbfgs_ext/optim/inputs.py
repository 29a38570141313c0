"""What a layer has seen: its input rows X (m x d_in), by what a step does with them.

========= =====================================================================
`Rows`    X itself: the ops take it
`Patches` the images of a convolution. X, a row per position of the kernel, has
          as many times their size as the kernel has elements: it is never formed
========= =====================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from kbfgs_ext import ops

BLOCK = 2**22  # elements of the patches that exist at one time: 16 MiB of float32
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class Inputs(Protocol):
    """The rows of one or several uses of a layer in a pass.

    Of a layer in groups every one has rows of its own, as many: vectors have a first dimension for
    them here, ``stack``, and so has A.
    """

    m: int

    def joined(self, others: Sequence[Any]) -> Inputs:
        """These rows, and those of the layer's other uses."""

    def columns(self, these: slice) -> Inputs:
        """Some columns of X."""

    def mean(self, out: torch.Tensor) -> None:
        """out = X'1/m, d_in."""

    def of_the_same_square(self, like: torch.Tensor) -> torch.Tensor:
        """Rows with the mean square of these, perhaps fewer, with the dtype of ``like``."""

    def action(self, s: torch.Tensor, out: torch.Tensor, backend: str) -> None:
        """out = X~'(X~ s)/m; with one entry more than d_in, X~ = [X, 1]."""

    def average(
        self, A: list[torch.Tensor], a_bar: torch.Tensor, decay: float, ok: Any, backend: str
    ) -> None:
        """`ops.factor_ema_` of one layer; without an ``A`` it writes ``a_bar`` alone."""


@dataclasses.dataclass
class Rows(Inputs):
    """Rows as they are."""

    X: torch.Tensor
    part_of: tuple[Rows, slice] | None = None  # whose columns these are, and which of them

    @property
    def m(self) -> int:  # type: ignore[override]
        """How many."""
        return self.X.shape[0]

    def joined(self, others: Sequence[Rows]) -> Rows:
        return Rows(torch.cat([self.X, *(other.X for other in others)])) if others else self

    def columns(self, these: slice) -> Rows:
        return Rows(self.X[:, these], (self, these))

    def mean(self, out: torch.Tensor) -> None:
        torch.mean(self.X, 0, dtype=out.dtype, out=out)

    def of_the_same_square(self, like: torch.Tensor) -> torch.Tensor:
        if self.part_of is None or not self.X.is_cuda:
            return self.X
        whole, these = self.part_of
        return whole.roots[:, these]

    @functools.cached_property
    def roots(self) -> torch.Tensor:
        """The root mean square of every column, as one row: a GPU reads them at once, where blocks
        of columns would be a launch each."""
        wide = torch.promote_types(self.X.dtype, torch.float32)
        norms = torch.linalg.vector_norm(self.X, dim=0, keepdim=True, dtype=wide)
        return norms.mul_(max(self.m, 1) ** -0.5)

    def average(
        self, A: list[torch.Tensor], a_bar: torch.Tensor, decay: float, ok: Any, backend: str
    ) -> None:
        ops.factor_ema_(A, [a_bar], [self.X], decay, ok, backend)

    def action(self, s: torch.Tensor, out: torch.Tensor, backend: str) -> None:
        ops.hessian_action_([out], [self.X], [s], [s.new_zeros(())], backend)


def mean_square(inputs: Inputs, like: torch.Tensor) -> torch.Tensor:
    """Of all entries of the rows, in float64."""
    X = inputs.of_the_same_square(like)
    norms = torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.float64)
    return norms.square() / (X.shape[-2] * X.shape[-1])


def features_last(x: torch.Tensor) -> Rows:
    """An input (..., d_in) as m x d_in rows."""
    x = plain(x)
    return Rows(x.reshape(-1, x.shape[-1]))


@dataclasses.dataclass(frozen=True)
class Window:
    """The places that a convolution's kernel takes in an image of as many dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]  # in the order of F.pad: before and after, the last dimension first
    mode: str  # of F.pad
    groups: int = 1  # of the channels

    def images(self, x: torch.Tensor) -> Patches:
        """An input (..., C, size): with several dimensions before the channels, or none."""
        x = plain(x)
        return Patches([(x.reshape(-1, *x.shape[-len(self.kernel) - 1 :]), self)])

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, size) with their edges."""
        return F.pad(x, self.padding, self.mode) if any(self.padding) else x

    def zeros(self) -> tuple[int, ...]:
        """The padding as a convolution makes it by itself, one number per dimension; or none."""
        before, after = self.padding[::2], self.padding[1::2]
        plain = self.mode == "constant" and before == after and min(before) >= 0
        return before[::-1] if plain else ()

    def places(self, x: torch.Tensor) -> int:
        """How many the kernel takes in one image of ``x``, not padded."""
        count, last = 1, len(self.kernel) - 1
        for i, k in enumerate(self.kernel):
            before, after = self.padding[2 * (last - i) : 2 * (last - i) + 2]
            room = x.shape[2 + i] + before + after - self.dilation[i] * (k - 1) - 1
            count *= room // self.stride[i] + 1
        return count

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """A view (B, places, C, kernel) of padded images (B, C, size), places in n dimensions."""
        n = len(self.kernel)
        for i, (k, step, apart) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            x = x.unfold(2 + i, apart * (k - 1) + 1, step)[..., ::apart]
        return x.movedim(1, 1 + n)


@dataclasses.dataclass(frozen=True)
class Spread:
    """The places of a transposed convolution's kernel: those of a convolution of stride 1 on the
    image with zeros between its pixels. All of it is turned round, so that the kernel need not be.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    def images(self, x: torch.Tensor, size: Sequence[int]) -> Patches:
        """An input (..., C, size) whose output has this ``size``."""
        x, n = plain(x), len(self.kernel)
        x = x.reshape(-1, *x.shape[-n - 1 :])
        places = zip(x.shape[2:], self.stride, strict=True)
        wide = x.new_zeros(*x.shape[:2], *((length - 1) * step + 1 for length, step in places))
        pixels: Any = (..., *(slice(None, None, step) for step in self.stride))
        wide[pixels] = x.flip(*range(2, 2 + n))
        padding: list[int] = []
        for i in reversed(range(n)):
            reach = self.dilation[i] * (self.kernel[i] - 1)
            after = reach - self.padding[i]
            padding += [size[i] + reach - wide.shape[2 + i] - after, after]
        ones, edges = (1,) * n, tuple(padding)
        window = Window(self.kernel, ones, self.dilation, edges, "constant", self.groups)
        return Patches([(wide, window)])


class Patches(Inputs):
    """The patches of images (B, C, size) under a kernel. Uses may differ in size and in all of the
    `Window` but its kernel.

    The mean patch comes of the mean image; X s is a convolution of the images with the one kernel
    s, and X'v that convolution's weight gradient. A moment is taken in blocks of patches.
    """

    def __init__(self, uses: list[tuple[torch.Tensor, Window]]) -> None:
        self._uses = uses
        self._rows = [len(x) * window.places(x) for x, window in uses]
        self.m = sum(self._rows)
        images, window = uses[0]
        self._groups = window.groups
        self._stack = (window.groups,) if window.groups > 1 else ()
        self._kernel = (window.groups, images.shape[1] // window.groups, *window.kernel)
        self._d_in = math.prod(self._kernel[1:])

    def joined(self, others: Sequence[Patches]) -> Patches:
        return Patches([use for one in (self, *others) for use in one._uses])

    def columns(self, these: slice) -> Patches:
        """The patches of some channels of every group, which begin and end with ``these``."""
        unit = math.prod(self._kernel[2:])
        channels = slice(these.start // unit, these.stop // unit)
        uses = [(x.unflatten(1, self._kernel[:2])[:, :, channels], w) for x, w in self._uses]
        return Patches([(x.flatten(1, 2), window) for x, window in uses])

    def mean(self, out: torch.Tensor) -> None:
        self._mean_patch([x.mean(0, dtype=out.dtype) for x, _ in self._uses], out)

    def of_the_same_square(self, like: torch.Tensor) -> torch.Tensor:
        """The root of the mean squared patch, as one row with the dtype of ``like``: it has the
        trace of X'X/m, and is finite where that is."""
        out = like.new_empty(*self._stack, self._d_in)
        self._mean_patch([x.to(out.dtype).square().mean(0) for x, _ in self._uses], out)
        return out.sqrt_().unsqueeze(-2)

    def _mean_patch(self, images: list[torch.Tensor], out: torch.Tensor) -> None:
        """The mean over all places of the batch's mean images."""
        out.zero_()
        for image, (_, window), rows in zip(images, self._uses, self._rows, strict=True):
            patches = window.patches(window.pad(image[None]))
            places = tuple(range(patches.dim() - image.dim()))
            out.add_(patches.mean(places).reshape(out.shape), alpha=rows / self.m)

    def action(self, s: torch.Tensor, out: torch.Tensor, backend: str) -> None:
        kernel, d_in, n = self._kernel, self._d_in, len(self._kernel) - 2
        weight_gradient = getattr(torch.nn.grad, f"conv{n}d_weight")  # type: ignore[attr-defined]
        taps, bias = s[..., :d_in], s[..., d_in:].flatten() if s.shape[-1] > d_in else None
        y, of_bias = out[..., :d_in], out[..., d_in:]
        out.zero_()
        with exact_convolutions():
            for x, window in self._uses:
                zeros = window.zeros()
                x = x.to(s.dtype) if zeros else window.pad(x.to(s.dtype))
                steps = window.stride, zeros or 0, window.dilation, self._groups
                v = CONVOLUTIONS[n - 1](x, taps.reshape(kernel), bias, *steps)
                gradient = weight_gradient(x, kernel, v, *steps)
                y.add_(gradient.reshape(y.shape), alpha=1 / self.m)
                v = v.transpose(0, 1).flatten(1).sum(1)
                of_bias.add_(v.view(*self._stack, 1), alpha=1 / self.m)

    def average(
        self, A: list[torch.Tensor], a_bar: torch.Tensor, decay: float, ok: Any, backend: str
    ) -> None:
        self.mean(a_bar[..., : self._d_in])
        if not A:
            return
        fine = torch.isfinite(self.of_the_same_square(a_bar)).all()
        fine = fine if ok is None else fine & ok
        weight, means = decay, torch.empty_like(a_bar)  # weight: what A holds of its final value
        if self._stack:
            A, mean = list(A[0].unbind()), list(means.unbind())
        else:
            mean = [means]
        for block in self.blocks():
            total = weight + (1 - decay) * len(block) / self.m
            X = block.unflatten(1, (self._groups, -1)).transpose(0, 1).contiguous()
            ops.factor_ema_(A, mean, list(X.unbind()), weight / total, fine, backend)
            weight = total

    def blocks(self) -> Iterator[torch.Tensor]:
        """All patches as rows, those of the groups side by side, at most `BLOCK` elements at a
        time."""
        for x, window in self._uses:
            yield from _blocks(window.patches(window.pad(x)), 1 + len(window.kernel))


def _blocks(patches: torch.Tensor, dims: int) -> Iterator[torch.Tensor]:
    """Rows of the first ``dims`` dimensions."""
    each = patches[0].numel()
    if each > BLOCK and dims > 1:
        for part in patches:
            yield from _blocks(part, dims - 1)
        return
    row = math.prod(patches.shape[dims:])
    for part in patches.split(max(1, BLOCK // each)):
        yield part.reshape(-1, row)


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Context: float32 convolutions on a GPU are that, and not torch's default of 10 bits."""
    settings: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def plain(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a dense tensor without a graph, with the features last: out of torch.func's wrappers
    (vmap, grad, jvp), of nested tensors and of sparse ones."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        batch = functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else -1
        x = functorch.get_unwrapped(x)
        if batch >= 0:
            x = x.movedim(batch, 0)
    x = x.detach()
    if x.is_nested:
        if x.layout is torch.jagged:
            return x.values()
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.unbind()])
    return x.to_dense() if x.layout is not torch.strided else x
