"""The two methods as sequences of ops on lists of layers: K-BFGS and K-BFGS(L).

stepping.py decides when; these classes say what. Step numbers are those of
docs/algorithm.md. Every call takes all layers of one param group at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from kbfgs_ext import ops
from kbfgs_ext.optim import hyper
from kbfgs_ext.optim.factors import LayerFactors, Plan
from kbfgs_ext.optim.restart import Orders, restart

SHORTEST = 1e-20  # length of a direction that still is one

Layers = list[LayerFactors]
Group = dict[str, Any]


def _each(layers: Layers, name: str) -> list[torch.Tensor]:
    return [layer[name] for layer in layers]


@dataclasses.dataclass
class KBFGSMethod:
    """K-BFGS: both inverse factors are kept as matrices."""

    plan: Plan
    backend: str
    step_length: str = "direction"

    def statistics(
        self, layers: Layers, group: Group, scalars: hyper.DeviceScalars, ok: torch.Tensor
    ) -> None:
        """Step 3: the activation factor and mean; at a layer's start also its damped inverse."""
        for layer in layers:
            if not layer.started:
                cold = [] if layer.warm_batches else [layer.average(self.plan)]
                ops.factor_ema_(cold, [layer["a_bar"]], [layer.observer.X()], 0.0, ok, self.backend)
        old = [layer for layer in layers if layer.started]
        A = _each(old, "A") if self.plan.keep_A else []
        X = [layer.observer.X() for layer in old]
        ops.factor_ema_(A, _each(old, "a_bar"), X, group["stat_decay"], ok, self.backend)
        for layer in layers:
            if not layer.started:
                layer.start_a(scalars.lam_a, self.plan)

    def descend(
        self,
        layers: Layers,
        group: Group,
        scalars: hyper.DeviceScalars,
        scratch: list[torch.Tensor],
        ok: torch.Tensor,
    ) -> None:
        """Steps 2 and 4: momentum, direction, weights."""
        whole = layers[0].uses("H_a") and layers[0].uses("H_g")
        if not whole or self.step_length != "direction":
            self._descend_in_parts(layers, group, scalars, scratch, ok)
            return
        dW, db, decay = self._gradients(layers, group)
        ops.kron_step_(
            W=[layer.W() for layer in layers],
            b=[layer.b() for layer in layers],
            M=_each(layers, "M"),
            P=_each(layers, "P"),
            work=scratch,
            dW=dW,
            db=db,
            H_g=_each(layers, "H_g"),
            H_a=_each(layers, "H_a"),
            step_size=self._step_sizes(layers, scalars),
            momentum=group["momentum"],
            weight_decay=decay,
            ok=ok,
            backend=self.backend,
        )
        written(layers)

    def _gradients(
        self, layers: Layers, group: Group
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
        """dL/dW and dL/db, and the weight decay still to be added to them.

        A frozen half of a layer has none: the other half's is then in its gradient already.
        """
        decay = group["weight_decay"]
        inside = decay if layers[0].halved else 0.0
        dW = [layer.dW(inside) for layer in layers]
        return dW, [layer.db(inside) for layer in layers], decay - inside

    def _descend_in_parts(
        self,
        layers: Layers,
        group: Group,
        scalars: hyper.DeviceScalars,
        scratch: list[torch.Tensor],
        ok: torch.Tensor,
    ) -> None:
        W, b = [layer.W() for layer in layers], [layer.b() for layer in layers]
        dW, db, decay = self._gradients(layers, group)
        ops.momentum_(
            _each(layers, "M"),
            dW,
            db,
            W,
            b,
            group["momentum"],
            decay,
            ok,
            self.backend,
        )
        self._direction(layers, scratch)
        sizes = self._step_sizes(layers, scalars)
        ops.descend_(W, b, _each(layers, "P"), sizes, ok, self.backend)
        written(layers)

    def _step_sizes(self, layers: Layers, scalars: hyper.DeviceScalars) -> list[torch.Tensor]:
        """What P is multiplied by; where it is not the same for all layers, P is there already."""
        if self.step_length == "direction":
            return [scalars.step_size] * len(layers)
        return _sizes(_each(layers, "P"), scalars.step_size, self.step_length == "balanced")

    def _direction(self, layers: Layers, scratch: list[torch.Tensor]) -> None:
        """Step 4's P; a factor that is missing is the identity."""
        M, P = _each(layers, "M"), _each(layers, "P")
        if layers[0].uses("H_a"):
            H_g = _each(layers, "H_g") if layers[0].uses("H_g") else []
            ops.kron_precondition_(P, H_g, M, _each(layers, "H_a"), scratch, self.backend)
        elif layers[0].uses("H_g"):
            for layer in layers:
                torch.mm(layer["H_g"], layer["M"], out=layer["P"])
        else:
            torch._foreach_copy_(P, M)

    def slope(self, layers: Layers) -> None:
        """The change of the loss that the gradient promises for the step just taken."""
        ops.slope_(
            slope=_each(layers, "slope"),
            W=[layer.W() for layer in layers],
            b=[layer.b() for layer in layers],
            saved=_each(layers, "saved"),
            dW=[layer.dW() for layer in layers],
            db=[layer.db() for layer in layers],
            backend=self.backend,
        )

    def output_change(self, layers: Layers) -> None:
        """Step 6's h_bar+ - h_bar, without the difference of two large means."""
        if layers:
            ops.output_change_(
                change=_each(layers, "h_change"),
                W=[layer.W() for layer in layers],
                b=[layer.b() for layer in layers],
                saved=_each(layers, "saved"),
                a_bar=_each(layers, "a_bar"),
                a_bar_next=_each(layers, "a_bar_next"),
                backend=self.backend,
            )

    def undo(self, layers: Layers, undo: torch.Tensor) -> None:
        """Put the parameters of before the step back where ``undo``."""
        W, b = [layer.W() for layer in layers], [layer.b() for layer in layers]
        ops.restore_(W, b, _each(layers, "saved"), undo, self.backend)
        written(layers)

    def curvature_from_activations(
        self,
        layers: Layers,
        group: Group,
        scalars: hyper.DeviceScalars,
        ok: torch.Tensor,
        orders: Orders,
    ) -> None:
        """Step 9 by itself: before the second pass, so that the activations of the first need not
        outlive it, or without one."""
        X = [] if self.plan.keep_A else [layer.observer.X() for layer in layers]
        self._curvature(layers, [], X, group, scalars, ok, ok, orders)

    def curvature(
        self,
        layers: Layers,
        with_activations: bool,
        group: Group,
        scalars: hyper.DeviceScalars,
        ok: torch.Tensor,
        ok_pair: torch.Tensor,
        orders: Orders,
    ) -> None:
        """Steps 6 to 8, and step 9 in the same call if ``with_activations`` (for "ema" alone)."""
        a_side = layers if with_activations and layers[0].uses("H_a") else []
        g_side = layers if layers[0].uses("H_g") else []
        if a_side or g_side:
            self._curvature(a_side, g_side, [], group, scalars, ok, ok_pair, orders)

    def _curvature(
        self,
        a_side: Layers,
        g_side: Layers,
        X: list[torch.Tensor],
        group: Group,
        scalars: hyper.DeviceScalars,
        ok: torch.Tensor,
        ok_pair: torch.Tensor,
        orders: Orders,
    ) -> None:
        ops.curvature_update_(
            H_a=_each(a_side, "H_a"),
            H_g=_each(g_side, "H_g"),
            s=_each(g_side, "s"),
            y=_each(g_side, "y"),
            counts_a=_each(a_side, "counts_a"),
            counts_g=_each(g_side, "counts_g"),
            work=_each(a_side or g_side, "work"),
            A=[] if X else _each(a_side, "A"),
            X=X,
            a_bar=_each(a_side, "a_bar"),
            h_change=_each(g_side, "h_change"),
            g_bar=_each(g_side, "g_bar"),
            g_bar_next=_each(g_side, "g_bar_next"),
            lam_a=[scalars.lam_a] * len(a_side),
            lam_g=[scalars.lam_g] * len(g_side),
            pair_decay=group["pair_decay"],
            mu1=group["powell"],
            ok=ok,
            ok_pair=ok_pair,
            backend=self.backend,
        )
        self._restart(a_side, "a", orders.a, scalars, X)
        self._restart(g_side, "g", orders.g, scalars)

    def _restart(
        self,
        layers: Layers,
        side: str,
        order: torch.Tensor | None,
        scalars: hyper.DeviceScalars,
        X: Sequence[torch.Tensor] = (),
    ) -> None:
        after = self.plan.restart_after
        if layers and after is not None:
            restart(layers, side, after, order, scalars.lam_a, list(X), self.backend)


class KBFGSLMethod(KBFGSMethod):
    """K-BFGS(L): the gradient factor is the last p pairs, applied without ever being formed.

    The ring starts from I. To start from gamma*I it holds the pairs (s, gamma*y), and H_g is gamma
    times what it says: gamma goes into H_g y and the size of the step, and no matrix is scaled.
    """

    def _step_sizes(self, layers: Layers, scalars: hyper.DeviceScalars) -> list[torch.Tensor]:
        sizes = super()._step_sizes(layers, scalars)
        gamma = _gamma(layers) if self.step_length != "layer" else []
        return list(torch._foreach_mul(sizes, gamma)) if gamma else sizes

    def _apply_H_g(self, layers: Layers, out: list[torch.Tensor], Q: list[torch.Tensor]) -> None:
        ops.lbfgs_two_loop_(
            out,
            Q,
            _each(layers, "S"),
            _each(layers, "Y"),
            _each(layers, "rho"),
            _each(layers, "pushed"),
            "auto",
            self.backend,
        )

    def descend(
        self,
        layers: Layers,
        group: Group,
        scalars: hyper.DeviceScalars,
        scratch: list[torch.Tensor],
        ok: torch.Tensor,
    ) -> None:
        """Steps 2 and 4: momentum, direction, weights."""
        self._descend_in_parts(layers, group, scalars, scratch, ok)

    def _direction(self, layers: Layers, scratch: list[torch.Tensor]) -> None:
        """P = H_g (M H_a), layer after layer on the CPU, where all share the scratch."""
        M, P, work = _each(layers, "M"), _each(layers, "P"), scratch
        if layers[0].bare:
            torch._foreach_copy_(P, M)
            return
        if not layers[0].uses("H_a"):
            self._apply_H_g(layers, P, M)
            return
        step = 1 if work[0].device.type == "cpu" else len(layers)
        for i in range(0, len(layers), step):
            part = slice(i, i + step)
            ops.kron_precondition_(
                work[part], [], M[part], _each(layers[part], "H_a"), P[part], self.backend
            )
            self._apply_H_g(layers[part], P[part], work[part])

    def curvature(
        self,
        layers: Layers,
        with_activations: bool,
        group: Group,
        scalars: hyper.DeviceScalars,
        ok: torch.Tensor,
        ok_pair: torch.Tensor,
        orders: Orders,
    ) -> None:
        """Steps 6 to 8 on the ring of pairs, and step 9 if ``with_activations``."""
        if with_activations and layers[0].uses("H_a"):
            self._curvature(layers, [], [], group, scalars, ok, ok, orders)
        s, y, Hy = (_each(layers, name) for name in ("s_damped", "y_damped", "Hy"))
        counts, c, gamma = _each(layers, "counts_g"), _each(layers, "g_bar"), _gamma(layers)
        ops.pair_ema_(
            _each(layers, "s"),
            _each(layers, "y"),
            _each(layers, "h_change"),
            c,
            _each(layers, "g_bar_next"),
            group["pair_decay"],
            ok_pair,
            self.backend,
        )
        torch._foreach_copy_(s + y, _each(layers, "s") + _each(layers, "y"))
        self._apply_H_g(layers, Hy, y)
        if gamma:
            torch._foreach_mul_(Hy, gamma)
        lam_g = [scalars.lam_g] * len(layers)
        ops.double_damping_(s, y, Hy, counts, [], lam_g, group["powell"], ok_pair, self.backend)
        if gamma:  # c too, so that the gate is that of (s, y); Hy has done its duty
            torch._foreach_copy_(Hy, c)
            c = Hy
            torch._foreach_mul_(y + c, gamma + gamma)
        ops.lbfgs_push_(
            _each(layers, "S"),
            _each(layers, "Y"),
            _each(layers, "rho"),
            _each(layers, "pushed"),
            counts,
            s,
            y,
            c,
            ok_pair,
            self.backend,
        )
        self._restart(layers, "g", orders.g, scalars)


def _sizes(P: list[torch.Tensor], size: torch.Tensor, balanced: bool) -> list[torch.Tensor]:
    """Per layer size/r, with r the root mean square of the rows of its P; or size*R/r, with R that
    of the rows of all layers. P = 0 stays 0."""
    rows = [p.shape[0] for p in P]
    norms = torch.stack(torch._foreach_norm(P)).to(size.dtype).clamp_(min=SHORTEST)
    if balanced:
        size = size * (torch.linalg.vector_norm(norms) / sum(rows) ** 0.5)
    sizes = list((size / norms).unbind())
    torch._foreach_mul_(sizes, [n**0.5 for n in rows])
    return sizes


def _gamma(layers: Layers) -> list[torch.Tensor]:
    return _each(layers, "gamma") if layers[0].uses("gamma") else []


def written(layers: Layers) -> None:
    """Tell autograd that the parameters have changed: kernels write behind its back."""
    torch.autograd.graph.increment_version([p for layer in layers for p in layer.parameters()])
