"""Which kernels are timed on which shapes, and by whom."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch

from kbfgs_ext.bench import (
    bfgs_update,
    double_damping,
    factor_ema,
    kron_precondition,
    lbfgs_two_loop,
    safeguard,
    spectral,
)
from kbfgs_ext.bench.kernel import Arguments, Kernel, Layer, Layers, Numbers
from kbfgs_ext.bench.precision import PRECISIONS
from kbfgs_ext.ops import registry

EAGER, COMPILED, BLAS = "eager", "torch.compile", "BLAS"
APART = ", a layer a call"
Run = Callable[[Arguments], None]
OURS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # by the device's type

KERNELS = tuple(
    kernel
    for family in (
        factor_ema,
        double_damping,
        bfgs_update,
        lbfgs_two_loop,
        kron_precondition,
        safeguard,
        spectral,
    )
    for kernel in family.KERNELS
)
ENCODERS = {  # of the paper's autoencoders: widths from the pixels to the code
    "mnist": (784, 1000, 500, 250, 30),
    "curves": (784, 400, 200, 100, 50, 25, 6),
    "faces": (625, 2000, 1000, 500, 30),
}
NARROW = ("X", "W", "b", "dW", "db")  # what may be 16-bit
SQUARES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHORT_SHAPES = (
    "mnist", "curves", "faces", "mnist 784-1000",
    "square 32", "square 128", "square 512", "square 2048",
)  # fmt: skip
# Seconds a call for the eager loop on 2 CPU cores: left to --full.
LONG = {("lbfgs_two_loop_, p = 100", "faces"), ("lbfgs_two_loop_, p = 100", "square 2048")}
MOST_SWEEPS = 20  # in one graph: the recursion's loop over pairs and layers unrolls
COMPILED_SHAPES = ("mnist 784-1000",)  # without --full: a shape costs 2 to 30 s of compilation


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel on a shape."""

    kernel: Kernel
    shape: str
    layers: Layers
    precision: str = "fp32"  # with 16 bits: of activations, parameters and gradients

    @property
    def key(self) -> tuple[str, str]:
        """What names it in rows."""
        return self.kernel.name, self.shape

    def build(self, device: torch.device | str) -> Arguments:
        """The arguments of the call; state is 32-bit at any precision."""
        args = self.kernel.build(self.layers, Numbers(device))
        half = PRECISIONS[self.precision].numbers
        return args | {name: [t.to(half) for t in args[name]] for name in NARROW if args.get(name)}


def mirrored(encoder: tuple[int, ...]) -> tuple[int, ...]:
    """Widths to the code and back."""
    return encoder + encoder[-2::-1]


@functools.cache
def shapes() -> dict[str, Layers]:
    """The autoencoders, each of their layers, and squares."""
    found: dict[str, Layers] = {}
    for name, encoder in ENCODERS.items():
        layers = tuple(itertools.starmap(Layer, itertools.pairwise(mirrored(encoder))))
        found[name] = layers
        found |= {f"{name} {x.d_in}-{x.d_out}": (x,) for x in layers}
    return found | {f"square {n}": (Layer(n, n, bias=False),) for n in SQUARES}


def cases(
    full: bool = False, kernels: str = "", only: str = "", precision: str = "fp32"
) -> list[Case]:
    """All cases, or the short selection; of kernels and shapes whose names hold these words."""
    return [
        Case(kernel, shape, layers, precision)
        for kernel in KERNELS
        for shape, layers in shapes().items()
        if full or (shape in SHORT_SHAPES and (kernel.name, shape) not in LONG)
        if kernels in kernel.name and only in shape
    ]


def providers(case: Case, device: torch.device) -> dict[str, Run]:
    """Who can run the case on ``device``, the eager reference first; `torch.compile` apart."""
    op = case.kernel.op
    found = {EAGER: registry.implementation(op, "reference").run}
    if case.kernel.blas is not None:
        found[BLAS] = registry.by_name(case.kernel.blas)
    for backend in OURS[device.type]:
        if registry.available(op, backend):
            found[backend] = _ours(op, backend)
            if len(case.layers) > 1:
                found[backend + APART] = _apart(found[backend])
    return found


def is_ours(provider: str) -> bool:
    """Whether the provider is a backend of this package."""
    return provider.removesuffix(APART) in registry.BACKENDS


def _ours(op: str, backend: str) -> Run:
    call, names = getattr(torch.ops.kbfgs_ext, op), registry.declaration(op).arguments[:-1]
    return lambda args: call(*[args[name] for name in names], backend)


SERIES = ("coefficients", "shifts")  # numbers that are the same for all entries


def _apart(run: Run) -> Run:
    """``run``, called once for each entry of the lists."""

    def calls(args: Arguments) -> None:
        each = [n for n, a in args.items() if isinstance(a, (list, tuple)) and n not in SERIES]
        for i in range(max(len(args[name]) for name in each)):
            run(args | {name: args[name][i : i + 1] for name in each})

    return calls


def compiled(case: Case) -> Run:
    """The eager reference through `torch.compile`."""
    torch._dynamo.reset()
    run = registry.implementation(case.kernel.op, "reference").run
    return torch.compile(run, dynamic=False)


def why_not_compiled(case: Case) -> str | None:
    """Why `torch.compile` cannot be asked, or None."""
    if case.kernel.op == "lbfgs_two_loop_":
        sweeps = sum(len(S) for S in case.build("meta")["S"])
        if sweeps > MOST_SWEEPS:
            return f"{sweeps} pairs unroll into one graph"
    return None
