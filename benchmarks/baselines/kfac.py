"""K-FAC with a sampled Fisher matrix, as the K-BFGS paper compares with it; plain PyTorch.

Per linear layer, with X~ = [X, 1] (m x n_a), S (m x n_g) the gradients of each sample's loss at the
layer's output for targets drawn from the model's own distribution, and D = [dL/dW, dL/db]:

    A <- stat_decay*A + (1-stat_decay)*X~'X~/m        G <- stat_decay*G + (1-stat_decay)*S'S/m
    M <- momentum*M + (1-momentum)*(D + weight_decay*[W, b])
    [W, b] <- [W, b] - lr * inv(G + lam*I) M inv(A + lam*I),   lam = sqrt(damping)

The inverses are made anew in each of the first ``inverse_every`` steps and every that many later.
Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
Curvature", ICML 2015, with the choices of Goldfarb, Ren and Bahamou, NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import Loss, cross_entropy, half_squared_error

INVERSE_EVERY = 20  # steps, as in the K-BFGS paper's comparison


def bernoulli(logits: Tensor) -> Tensor:
    """Gradients (m, d) of the cross-entropy with targets drawn from Bernoulli(sigmoid(logits)).

    NaN stays NaN, so that a run that has diverged ends as one.
    """
    p = logits.sigmoid()
    return p - p.nan_to_num(0.5).bernoulli()


def gaussian(outputs: Tensor) -> Tensor:
    """Gradients (m, d) of half the squared error with targets drawn from N(outputs, I)."""
    return torch.randn_like(outputs)


def categorical(logits: Tensor) -> Tensor:
    """Gradients (m, d) of the cross-entropy with classes drawn from softmax(logits); NaN stays."""
    p = logits.softmax(1)
    drawn = p.nan_to_num(1.0).multinomial(1)
    return p.scatter_add(1, drawn, p.new_full(drawn.shape, -1.0))


def scaled_gaussian(outputs: Tensor) -> Tensor:
    """Gradients (m, d) of the mean squared error, the d outputs of each sample averaged, with
    targets drawn from N(outputs, d/2*I)."""
    return torch.randn_like(outputs) * math.sqrt(2 / outputs.shape[1])


# Each loss is the negative logarithm of a distribution, which is the one to draw targets from.
SAMPLED: dict[Loss, Callable[[Tensor], Tensor]] = {
    cross_entropy: bernoulli,
    half_squared_error: gaussian,
    F.cross_entropy: categorical,
    F.mse_loss: scaled_gaussian,
}


def wide(t: Tensor) -> Tensor:
    """Of 32 bits at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def damped_inverse(factor: Tensor, lam: float) -> Tensor:
    """inv(factor + lam*I) of a symmetric positive semidefinite factor (n, n).

    NaN where rounding has made it indefinite, as it does on the way to divergence.
    """
    damped = factor + lam * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    root, failed = torch.linalg.cholesky_ex(damped)
    return torch.full_like(factor, math.nan) if failed else torch.cholesky_inverse(root)


class Layer:
    """A linear layer, its factors and their inverses."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.parameters = list(module.parameters())  # weight, and bias if there is one
        self.X = self.h = torch.empty(0)  # input (m, d_in) and output (m, n_g) of the last forward
        self.A = self.G = torch.empty(0)  # (n_a, n_a) and (n_g, n_g)
        self.inv_A = self.inv_G = torch.empty(0)
        self.M = torch.zeros_like(self.joined(self.parameters))  # (n_g, n_a)
        module.register_forward_hook(self.see)

    @staticmethod
    def joined(parts: Iterable[Tensor]) -> Tensor:
        """Weight-shaped and bias-shaped tensors as one matrix (n_g, n_a), of 32 bits at least."""
        return wide(
            torch.cat([p.detach() if p.ndim == 2 else p.detach()[:, None] for p in parts], 1)
        )

    def see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep input and output of a forward pass."""
        self.X, self.h = args[0].detach(), output

    def factors(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """X~'X~/m and S'S/m for gradients S (m, n_g) at the output."""
        X, S, m = wide(self.X), wide(S), len(S)
        if self.module.bias is not None:
            X = torch.cat([X, X.new_ones(m, 1)], 1)
        with torch.autocast(X.device.type, enabled=False):
            return X.T @ X / m, S.T @ S / m

    def invert(self, lam: float) -> None:
        """Make both inverses anew."""
        self.inv_A, self.inv_G = damped_inverse(self.A, lam), damped_inverse(self.G, lam)

    def descend(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Momentum, direction and the step itself."""
        D = self.joined(p.grad for p in self.parameters)
        D.add_(self.joined(self.parameters), alpha=weight_decay)
        self.M.lerp_(D, 1 - momentum)
        P = self.inv_G @ self.M @ self.inv_A
        parts = P.split(self.module.in_features, 1)
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.sub_(part.reshape(parameter.shape), alpha=lr)


Receive = Callable[[Layer, Tensor, Tensor], None]  # takes a layer's new factors


class KFAC(torch.optim.Optimizer):
    """K-FAC for a ``model`` of linear layers trained with ``loss``; see the module.

    Raises ValueError where a parameter of the model is in no linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        lr: float = 1.0,
        damping: float = 3.0,
        momentum: float = 0.9,
        stat_decay: float = 0.9,
        inverse_every: int = INVERSE_EVERY,
        weight_decay: float = 0.0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "stat_decay": stat_decay,
            "inverse_every": inverse_every,
            "weight_decay": weight_decay,
        }
        super().__init__(model.parameters(), defaults)
        self.model = model
        self.layers = [Layer(m) for m in model.modules() if isinstance(m, nn.Linear)]
        covered = {id(p) for layer in self.layers for p in layer.parameters}
        if any(id(p) not in covered for p in model.parameters()):
            raise ValueError("K-FAC is written for models of linear layers alone")
        self.steps = 0
        self._sample = SAMPLED[loss]
        self._receive: Receive | None = None
        model.register_forward_hook(self._after_forward)

    def _after_forward(self, model: nn.Module, args: tuple[Tensor, ...], outputs: Tensor) -> None:
        """Backward with sampled targets on the graph just built, without weight gradients."""
        if self._receive is None:
            return
        self.gather(self.sampled_gradients(outputs), self._receive)

    def sampled_gradients(self, outputs: Tensor) -> Sequence[Tensor]:
        """Each layer's S for targets drawn from the distribution of ``outputs``."""
        return torch.autograd.grad(
            outputs,
            [layer.h for layer in self.layers],
            self._sample(outputs.detach()),
            retain_graph=True,
        )

    def gather(self, S: Sequence[Tensor], receive: Receive) -> None:
        """Make each layer's factors of this batch and hand them over."""
        for layer, gradients in zip(self.layers, S, strict=True):
            receive(layer, *layer.factors(gradients))

    def _forward_with(self, receive: Receive, run: Callable[[], Tensor]) -> Tensor:
        self._receive = receive
        try:
            with torch.enable_grad():
                return run()
        finally:
            self._receive = None

    def warm_start(self, batches: Iterable[Tensor]) -> None:
        """Let the factors start as their averages over ``batches`` of inputs."""
        for count, batch in enumerate(batches):

            def average(layer: Layer, A: Tensor, G: Tensor, count: int = count) -> None:
                layer.A = A if count == 0 else layer.A.lerp_(A, 1 / (count + 1))
                layer.G = G if count == 0 else layer.G.lerp_(G, 1 / (count + 1))

            self._forward_with(average, lambda batch=batch: self.model(batch))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One step; ``closure`` drops the gradients, runs forward and backward, returns the loss.

        It must run the model once.
        """
        group = self.param_groups[0]

        def update(layer: Layer, A: Tensor, G: Tensor) -> None:
            if not len(layer.A):  # no warm start
                layer.A, layer.G = A, G
            else:
                layer.A.lerp_(A, 1 - group["stat_decay"])
                layer.G.lerp_(G, 1 - group["stat_decay"])

        loss = self._forward_with(update, closure)
        inverse_every = group["inverse_every"]
        if self.steps < inverse_every or self.steps % inverse_every == 0:
            for layer in self.layers:
                layer.invert(math.sqrt(group["damping"]))
        for layer in self.layers:
            layer.descend(group["lr"], group["momentum"], group["weight_decay"])
        self.steps += 1
        return loss
