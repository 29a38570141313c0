"""The time of a step on an H100, predicted from what it launches, moves and multiplies.

Written down before a GPU had run one; docs/gpu.md has what one then measured beside it. A step
runs on tensors without values: torch's ops are counted as they come, ours by
`benchmarks.launches` and `kbfgs_ext.bench.cost`. A kernel takes the longer of its bytes at copy
speed and its FLOPs at peak, and a gap before it; an eager step, whose launches are the host's work
beside that of the device, takes the longer of the two. Bytes and FLOPs are those of the arguments:
a kernel that reads them again moves more, what stays in the L2 costs less, and none reaches the
peaks.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import launches
from benchmarks.step.counts import computes
from benchmarks.step.models import Model
from benchmarks.step.providers import PAPER
from kbfgs_ext import KBFGS, presets
from kbfgs_ext.bench.cost import cost
from kbfgs_ext.ops import registry
from kbfgs_ext.ops.spectral import COEFFICIENTS
from kbfgs_ext.optim.settings import Settings

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
TF32_PRODUCTS = {"polar_": 3, "kron_precondition_": 1, "kron_step_": 1, "factor_ema_": 1}  # for one


@dataclasses.dataclass(frozen=True)
class Machine:
    """An H100: section "Prediction" of docs/gpu.md."""

    bytes: float = 3.0e12  # a second, read and written
    fp32: float = 60e12  # FLOPs a second
    tf32: float = 400e12
    gap: float = 1e-6  # seconds between the kernels of a graph
    launch: float = 4e-6  # of the host for one


H100 = Machine()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one op of a step asks for."""

    name: str
    launches: int
    bytes: int
    flops: int
    products: int = 0  # on tensor cores in the place of one, where TF32 is allowed; 0: none

    def seconds(self, machine: Machine, tf32: bool) -> float:
        """On the device, without gaps."""
        peak = machine.tf32 / self.products if tf32 and self.products else machine.fp32
        return max(self.bytes / machine.bytes, self.flops / peak)


@dataclasses.dataclass(frozen=True)
class Step:
    """One kind of step: the kernels of its passes, and all others."""

    passes: tuple[Kernel, ...]
    own: tuple[Kernel, ...]

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All."""
        return self.passes + self.own

    def captured(self, machine: Machine = H100, tf32: bool = False) -> float:
        """Seconds of a replay."""
        count = sum(k.launches for k in self.kernels)
        return count * machine.gap + sum(k.seconds(machine, tf32) for k in self.kernels)

    def eager(self, machine: Machine = H100, tf32: bool = False) -> float:
        """Seconds of an ordinary step, if the host does nothing but launch."""
        count = sum(k.launches for k in self.kernels)
        return max(count * machine.launch, self.captured(machine, tf32))


class Trace(TorchDispatchMode):
    """Context that notes kernels, and runs none of ours: tensors have no values.

    ``backend`` runs our ops: "cuda", "triton", or "auto" for what is taken on a GPU that has both.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._backend = backend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "kbfgs_ext":
            self.kernels.append(self._ours(func._opname, args, kwargs))
            return None
        if func.namespace == "prim":
            return func(*args, **kwargs)
        with self:  # without gradients composite ops come whole: look inside
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if computes(func):
            self.kernels.append(_torchs(func, args, kwargs, result))
        return result

    def _ours(self, op: str, args: tuple, kwargs: dict) -> Kernel:
        call = registry.declaration(op).call(args, kwargs)
        del call["backend"]
        if op == "polar_":
            call |= {"coefficients": COEFFICIENTS, "shifts": None}  # on a GPU
        backend = self._backend
        if backend == "auto":
            backend = registry.order(op, call)[0]
        moved, flops = cost(op, call)
        products = TF32_PRODUCTS.get(op, 0)
        if (op, backend) in (("polar_", "cuda"), ("factor_ema_", "cuda")):
            products = 0  # fp32 throughout
        return Kernel(op, launches.ours(op, call, backend), moved, flops, products)


def _torchs(func: Any, args: tuple, kwargs: dict, result: Any) -> Kernel:
    moved = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
    count = sum(t.numel() * t.element_size() for t in moved.values())
    flops = sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
    products = int(func._opname in PRODUCTS)
    if func._opname.startswith("convolution"):
        flops = _convolution(args, result)
    elif products:
        left, right = [t for t in args if isinstance(t, Tensor)][-2:]
        flops = 2 * left.numel() * right.shape[-1]
    return Kernel(func._opname, launches.torchs(func, args), count, flops, products)


def _convolution(args: tuple, output: Any) -> int:
    """FLOPs of a convolution or of its backward, which is of as many for each gradient."""
    if isinstance(output, Tensor):
        (x, weight), transposed, results = args[:2], args[6], 1
    else:
        (output, x, weight), transposed, results = args[:3], args[7], sum(args[-1][:2])
    return 2 * (x if transposed else output).numel() * weight[0].numel() * results


def settings() -> dict[str, dict[str, Any]]:
    """What is predicted, by name: the paper's recursion with a safeguard, TUNED, the defaults."""
    return {
        "PUBLISHED, safeguard": PAPER,
        "TUNED": presets.TUNED,
        "defaults": {},
    }


def adamw(model: Model, size: int | None = None) -> Step:
    """The step to compare with: torch's fused AdamW."""
    with _without_values():
        network, x = model.build(), model.batch(size or model.batch_size)
        opt = torch.optim.AdamW(network.parameters(), fused=True, capturable=False)
        passes = _traced(lambda: _pass(network, model, x))
        opt.step()  # makes its state
        return Step(passes, _traced(opt.step))


def steps(
    model: Model, options: dict[str, Any], backend: str = "auto", size: int | None = None
) -> dict[bool, Step]:
    """A step of `KBFGS` with ``options`` of each kind: with a second pass (True) and without."""
    with _without_values():
        network, x = model.build(), model.batch(size or model.batch_size)
        first = _traced(lambda: _pass(network, model, x))
        opt = KBFGS(network, **options)
        anchors = [layer.observer.anchor() for layer in opt.layers]
        network.requires_grad_(False)  # a second pass wants the biases' gradients alone
        for anchor in anchors:
            anchor.requires_grad_(True)
        second = _traced(lambda: _pass(network, model, x))
        network.requires_grad_(True)
        found: dict[bool, Step] = {}
        for number in range(2 + opt.steps.settings.pair_every):
            with Trace(backend) as trace:
                opt.step(lambda: _pass(network, model, x))
            if number:  # the first starts the factors
                paired = (number % opt.steps.settings.pair_every) == 0
                passes = first + (second if paired else ())
                found[paired] = Step(passes, tuple(_without(trace.kernels, passes)))
        return found


def mean(kinds: dict[bool, Step], period: int, of: Callable[[Step], float]) -> float:
    """Over a period of steps, of which one has a second pass."""
    return (of(kinds[True]) + (period - 1) * of(kinds.get(False, kinds[True]))) / period


def _pass(network: nn.Module, model: Model, x: Tensor) -> Tensor:
    for p in network.parameters():
        p.grad = None
    loss = model.loss(network(x), x)
    loss.backward()
    return loss


def _traced(act: Callable[[], object]) -> tuple[Kernel, ...]:
    with Trace() as trace:
        act()
    return tuple(trace.kernels)


def _without(kernels: list[Kernel], passes: tuple[Kernel, ...]) -> Iterator[Kernel]:
    """``kernels`` without those of the passes, each of which is among them."""
    left = list(passes)
    for kernel in kernels:
        if kernel in left:
            left.remove(kernel)
        else:
            yield kernel
    assert not left, f"of the passes alone: {left}"


class _without_values:
    """Context: tensors have shapes and no values."""

    def __enter__(self) -> None:
        self._mode, self._quiet = FakeTensorMode(), warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.simplefilter("ignore")
        self._mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self._quiet.__exit__(*error)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of a step of one setting, the mean over a period."""

    name: str
    own: tuple[int, ...]  # kernels outside the passes, by kind of step: with a second pass, without
    launches: float
    megabytes: float
    gigaflops: float
    captured: float  # microseconds
    captured_tf32: float
    eager: float


def predictions(model: Model, size: int | None = None) -> list[Prediction]:
    """Of AdamW and of all `settings`."""
    found = [_prediction("AdamW, fused", {True: adamw(model, size)}, 1)]
    for name, options in settings().items():
        kinds = steps(model, options, size=size)
        period = options.get("pair_every", Settings.pair_every)
        found.append(_prediction(f"K-BFGS, {name}", kinds, period))
    return found


def _prediction(name: str, kinds: dict[bool, Step], period: int) -> Prediction:
    def over(of: Callable[[Step], float]) -> float:
        return mean(kinds, period, of)

    return Prediction(
        name,
        tuple(sum(k.launches for k in kinds[kind].own) for kind in sorted(kinds, reverse=True)),
        over(lambda step: sum(k.launches for k in step.kernels)),
        over(lambda step: sum(k.bytes for k in step.kernels)) / 1e6,
        over(lambda step: sum(k.flops for k in step.kernels)) / 1e9,
        over(lambda step: step.captured()) * 1e6,
        over(lambda step: step.captured(tf32=True)) * 1e6,
        over(lambda step: step.eager()) * 1e6,
    )


def rows(found: list[Prediction]) -> list[list[str]]:
    """For a table: predictions beside the ratio to the first."""
    first = found[0]
    return [
        [
            p.name, " / ".join(map(str, p.own)), f"{p.launches:.0f}", f"{p.megabytes:.0f}",
            f"{p.gigaflops:.0f}", f"{p.captured:.0f}", f"{p.captured / first.captured:.1f}",
            f"{p.captured_tf32:.0f}", f"{p.captured_tf32 / first.captured_tf32:.1f}",
            f"{p.eager:.0f}",
        ]
        for p in found
    ]  # fmt: skip


HEADS = [
    "", "kernels of its own", "kernels", "MB", "GFLOP", "captured, us", "ratio", "TF32, us",
    "ratio", "eager, us",
]  # fmt: skip


def markdown(found: list[Prediction]) -> str:
    """The table of docs/gpu.md."""
    marks = ["---", *["---:"] * (len(HEADS) - 1)]
    lines = [HEADS, marks, *rows(found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
