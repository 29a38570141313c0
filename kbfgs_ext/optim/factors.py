"""Per-layer state of K-BFGS: the factors, the pair, and the scratch of a step."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from kbfgs_ext.ops.bfgs_update.api import workspace_size
from kbfgs_ext.optim.capture import Observer
from kbfgs_ext.optim.layers import Linear

ACCUMULATION = torch.float32  # factors of 16-bit parameters are kept in this dtype


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the optimizer keeps for a layer: decided once, the same for all layers."""

    keep_A: bool  # hessian_action="ema"
    memory: int | None  # pairs of K-BFGS(L); None keeps H_g
    max_factor_dim: int | None = None  # a larger side has no matrix factor: the identity
    restart_after: int | None = None  # rejected pairs, or undone steps, in a row
    initial_scale: float | str = 1.0  # gamma: H_g starts as gamma*I; "damping" takes 1/lam_g

    def keeps_a(self, layer: LayerFactors) -> bool:
        """Whether the layer's activation side has a factor."""
        return self.max_factor_dim is None or layer.n_a <= self.max_factor_dim

    def keeps_g(self, layer: LayerFactors) -> bool:
        """Whether the layer's gradient side has one; a ring of pairs has no matrix to be large."""
        large = self.max_factor_dim is not None and layer.n_g > self.max_factor_dim
        return self.memory is not None or not large

    def left_out(self, layer: LayerFactors) -> list[str]:
        """The sides without a factor, for people."""
        sides = (("n_a", layer.n_a, self.keeps_a(layer)), ("n_g", layer.n_g, self.keeps_g(layer)))
        return [f"{name} {size}" for name, size, kept in sides if not kept]


class LayerFactors:
    """A covered layer: its parameters, its capture slot, and its tensors.

    ``kept`` is what a checkpoint holds; ``scratch`` lives from one half of a step to the other.

    ========== ============== ==================================================================
    kept       shape          meaning
    ========== ============== ==================================================================
    M          n_g x n_a      momentum
    A          n_a x n_a      activation factor (hessian_action="ema" only)
    H_a        n_a x n_a      inverse activation factor; before the start, the average of X~'X~/m
    H_g        n_g x n_g      inverse gradient factor (K-BFGS)
    S, Y       p x n_g        ring of pairs (K-BFGS(L)), with rho (p) and pushed (scalar)
    gamma      scalar         H_g is gamma times what the ring says (initial_scale other than 1)
    s, y       n_g            moving averages of the pair
    counts_a/g 4              accepted, rejected, Powell-damped, LM-damped
    marks_a/g  3              accepted, rejected at a streak's begin, restarts
    ========== ============== ==================================================================

    A side larger than ``max_factor_dim`` has none of its own but the counts, which stay zero.
    """

    def __init__(self, name: str, modules: list[nn.Module], kind: type[Linear]) -> None:
        self.name = name
        self.kind = kind
        self.modules = modules  # all that use the weight
        module = modules[0]
        self.weight: nn.Parameter = kind.weight(module)
        bias = kind.bias(module)
        self.bias: nn.Parameter | None = bias if bias is not None and bias.requires_grad else None
        n_g, d_in = kind.matrix(self.weight).shape
        self.n_g, self.d_in, self.n_a = n_g, d_in, d_in + (self.bias is not None)
        self.observer = Observer(name, kind, n_g)
        self.observer.weight, self.observer.bias = self.weight, self.bias
        self.started = False  # H_a is the inverse factor, no longer the average
        self.moving: list[nn.Parameter] = []  # the parameters that this step moves
        self.bare = False  # this step goes without factors: the layer's input was never seen
        self.warm_batches = 0  # averaged into the factor by warm_start so far
        self.kept: dict[str, torch.Tensor] = {}
        self.scratch: dict[str, torch.Tensor] = {}
        self._no_bias = torch.empty(0)

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors: the weight's, but never less than 32 bits."""
        return torch.promote_types(self.weight.dtype, ACCUMULATION)

    def kept_shapes(self, plan: Plan) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every kept tensor under ``plan``."""
        n_a, n_g, real = self.n_a, self.n_g, self.dtype
        shapes = {
            "M": ((n_g, n_a), real),
            "counts_a": ((4,), torch.int64),
            "counts_g": ((4,), torch.int64),
        }
        if plan.restart_after is not None:
            shapes["marks_a"] = shapes["marks_g"] = ((3,), torch.int64)
        if plan.keeps_a(self):
            shapes["H_a"] = ((n_a, n_a), real)
            if plan.keep_A:
                shapes["A"] = ((n_a, n_a), real)
        if plan.keeps_g(self):
            shapes["s"] = shapes["y"] = ((n_g,), real)
            if plan.memory is None:
                shapes["H_g"] = ((n_g, n_g), real)
        if plan.memory is not None:
            shapes["S"] = shapes["Y"] = ((plan.memory, n_g), real)
            shapes["rho"] = ((plan.memory,), real)
            shapes["pushed"] = ((), torch.int64)
            if plan.initial_scale != 1.0:
                shapes["gamma"] = ((), real)
        return shapes

    def scratch_shapes(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """Shape of every scratch tensor under ``plan``, but for the shared product scratch."""
        n_a, n_g = self.n_a, self.n_g
        shapes: dict[str, tuple[int, ...]] = {
            "P": (n_g, n_a),
            "work": (workspace_size(n_a, n_g),),
            "slope": (n_g,),
        }
        shapes["a_bar"] = shapes["a_bar_next"] = (n_a,)
        for name in ("h_change", "g_bar", "g_bar_next"):
            shapes[name] = (n_g,)
        if plan.memory is not None:
            for name in ("s_damped", "y_damped", "Hy"):
                shapes[name] = (n_g,)
        return shapes

    def allocate(self, plan: Plan) -> None:
        """Make the tensors, on the weight's device; the ones that exist stay."""
        device = self.weight.device
        if not self.kept:
            for name, (shape, dtype) in self.kept_shapes(plan).items():
                self.kept[name] = torch.empty(shape, dtype=dtype, device=device)
            self.clear()
        if not self.scratch:
            for name, shape in self.scratch_shapes(plan).items():
                self.scratch[name] = torch.zeros(shape, dtype=self.dtype, device=device)
            self.scratch["saved"] = self.scratch["P"]  # descend_ leaves [W, b] of before there
            for name in ("a_bar", "a_bar_next"):
                self.scratch[name][self.d_in :] = 1.0  # the mean of the column of ones
            self._no_bias = torch.empty(0, dtype=self.weight.dtype, device=device)

    def clear(self) -> None:
        """What is kept is as before the first step."""
        for tensor in self.kept.values():
            tensor.zero_()
        if "H_g" in self.kept:
            self.kept["H_g"].fill_diagonal_(1.0)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.kept.get(name)
        return self.scratch[name] if tensor is None else tensor

    def has(self, name: str) -> bool:
        """Whether the kept tensor exists, once they are allocated."""
        return name in self.kept

    def uses(self, factor: str) -> bool:
        """Whether this step is made with the factor."""
        return self.has(factor) and not self.bare

    # The parameters and their gradients as the ops want them: matrices, and empty for no bias.

    def W(self) -> torch.Tensor:
        """The weight, d_out x d_in."""
        return self.kind.matrix(self.weight.detach())

    def b(self) -> torch.Tensor:
        """The bias, or an empty tensor."""
        return self._no_bias if self.bias is None else self.bias.detach()

    def dW(self, decay: float = 0.0) -> torch.Tensor:
        """The weight's gradient plus ``decay*W``, d_out x d_in; zero where it is frozen."""
        return self.kind.matrix(self._gradient(self.weight, "no_dW", decay))

    def db(self, decay: float = 0.0) -> torch.Tensor:
        """The bias's gradient, as the weight's; or an empty tensor."""
        return self._no_bias if self.bias is None else self._gradient(self.bias, "no_db", decay)

    def _gradient(self, p: nn.Parameter, zero: str, decay: float) -> torch.Tensor:
        if any(p is moved for moved in self.moving):
            assert p.grad is not None
            return p.grad.add(p.detach(), alpha=decay) if decay else p.grad
        if zero not in self.scratch or self.scratch[zero].dtype != p.dtype:
            self.scratch[zero] = torch.zeros_like(p, requires_grad=False)
        return self.scratch[zero]

    def parameters(self) -> list[nn.Parameter]:
        """The covered parameters: the weight, and the bias where it is trained."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def look(self) -> None:
        """After the first pass: which parameters move, those with a new gradient that want one."""
        self.moving = [
            p
            for p in self.parameters()
            if p.grad is not None and p.requires_grad and not self.observer.is_stale(p)
        ]
        if self.moving:
            self.observer.settle()
        self.bare = not self.started and not self.observer.seen

    @property
    def halved(self) -> bool:
        """Whether this step moves the weight or the bias alone: the other is frozen."""
        return len(self.moving) < len(self.parameters())

    def hold(self) -> None:
        """Put the frozen half of a layer back after a step, bit for bit."""
        moving = {id(p) for p in self.moving}
        saved = self.scratch["saved"]
        if id(self.weight) not in moving:
            self.W().copy_(saved[:, : self.d_in])
        if self.bias is not None and id(self.bias) not in moving:
            self.b().copy_(saved[:, self.d_in])

    def average(self, plan: Plan) -> torch.Tensor:
        """Where X~'X~/m is averaged before the start: A, or the place of H_a without A."""
        return self.kept["A" if plan.keep_A else "H_a"]

    def reset(self) -> None:
        """Back to before the start; what is counted stays."""
        for name, tensor in self.kept.items():
            if not name.startswith(("counts", "marks")):
                tensor.zero_()
        for side in "ag":
            if self.has("marks_" + side):  # no streak of rejected pairs goes on
                self.kept["marks_" + side][:2] = self.kept["counts_" + side][:2]
        self.started, self.warm_batches = False, 0

    def start_g(self, lam_g: torch.Tensor, plan: Plan) -> None:
        """H_g = gamma*I; a ring of pairs keeps gamma beside it."""
        if self.has("H_g") or self.has("gamma"):
            place = self.kept["H_g"].diagonal() if self.has("H_g") else self.kept["gamma"]
            if isinstance(plan.initial_scale, str):
                place.copy_(1 / lam_g)
            else:
                place.fill_(plan.initial_scale)

    def start_a(self, lam_a: torch.Tensor, plan: Plan) -> None:
        """H_a = inv(A_0 + lam_a*I), from the average that the warm start or first batch left.

        The one O(n^3) operation of a run, in float64: its condition is that of A_0/lam_a.
        """
        H_a = self.kept["H_a"]
        damped = self.average(plan).to(torch.float64, copy=True)
        damped.diagonal().add_(lam_a)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(damped)[0])
        H_a.copy_(inverse.add_(inverse.T.clone()).mul_(0.5))
        self.started = True
