"""The factors: one block of a side of a layer each, with the mathematics that is its own.

================== ====== ==============================================================
class              side   the inverse factor H
================== ====== ==============================================================
`ActivationMatrix` a      H_a, n_a x n_a; it follows A (hessian_action="ema") or the minibatch
`GradientMatrix`   g      H_g, n_g x n_g, and the averaged pair that updates it
`PairRing`         g      the last p pairs: H_g is applied and never formed (K-BFGS(L))
================== ====== ==============================================================

A side is one block, or several where it is longer than ``block_size``: H is then block-diagonal,
and each block has a pair, a gate and counts of its own. n_a, n_g below are the block's rows. The
groups of a convolution have a block each, all alike: a factor is then the stack of them.

A factor owns its tensors, their start and their checkpoint. What it does in a step is a static
method on a `Part`, since an op takes the blocks of all layers in one call: the kinds of a part's
two sides decide which ops a step is made of. Step numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from kbfgs_ext import ops
from kbfgs_ext.optim.inputs import Inputs
from kbfgs_ext.optim.settings import Settings
from kbfgs_ext.optim.updates import Verdict, restart, update_activations, update_matrices

if TYPE_CHECKING:
    from kbfgs_ext.optim.parts import Part

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Tensors = list[torch.Tensor]


class Factor:
    """One block of one side of one layer; of a layer in groups a stack, one block per group.

    Args:
        side: "a" (activations) or "g" (gradients).
        rows: of the side, or of what a group has of it.
        settings: of the whole optimizer.
        stack: (groups,), the first dimension of all its tensors, or () without groups.
    """

    vectors: tuple[str, ...] = ()  # of the layer's scratch, over a side, those that a factor uses

    def __init__(
        self, side: str, rows: slice, settings: Settings, stack: tuple[int, ...] = ()
    ) -> None:
        self.side, self.rows, self.settings, self.stack = side, rows, settings, stack
        self.n, self.count = rows.stop - rows.start, math.prod(stack)
        self.kept: dict[str, torch.Tensor] = {}
        self.scratch: dict[str, torch.Tensor] = {}  # its rows of the layer's

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.kept.get(name)
        return self.scratch[name] if tensor is None else tensor

    def blocks(self, name: str) -> Tensors:
        """A tensor of each of its blocks."""
        return list(self[name].unbind()) if self.stack else [self[name]]

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """Its entries of a vector over the whole side."""
        return vector.view(*self.stack, -1)[..., self.rows]

    def kept_shapes(self, real: torch.dtype) -> Shapes:
        """Shape and dtype of every tensor of a checkpoint; ``real`` is the factor's dtype."""
        shapes = self.block_shapes(real).items()
        return {name: ((*self.stack, *shape), dtype) for name, (shape, dtype) in shapes}

    def block_shapes(self, real: torch.dtype) -> Shapes:
        """The same of one block."""
        shapes: Shapes = {f"counts_{self.side}": ((4,), torch.int64)}
        if self.settings.restart_after is not None:
            shapes[f"marks_{self.side}"] = ((3,), torch.int64)
        return shapes

    def clear(self) -> None:
        """As before the first step."""
        for tensor in self.kept.values():
            tensor.zero_()

    def reset(self) -> None:
        """Back to before the start; what is counted stays, and no streak of rejected pairs."""
        for name, tensor in self.kept.items():
            if not name.startswith(("counts", "marks")):
                tensor.zero_()
        marks = self.kept.get(f"marks_{self.side}")
        if marks is not None:
            marks[..., :2] = self.kept[f"counts_{self.side}"][..., :2]

    def start(self, lam: torch.Tensor) -> None:
        """The factor of the first step, with the damping ``lam``."""

    def _scales(self) -> Shapes:
        """What relative dampings of the gradient side are made of."""
        names = ("ss", "yy") if self.settings.relative_damping else ()
        return dict.fromkeys(names, ((), torch.float64))

    # A step's, on all blocks of a part. Those of the gradient side also do what is left to do for
    # the activation side, because the ops take both sides at once.

    @staticmethod
    def precondition(part: Part, M: Tensors, work: Tensors) -> None:
        """Step 4: P = H_g M H_a; ``work`` is the product scratch."""
        raise NotImplementedError

    @staticmethod
    def precondition_rows(part: Part, M: Tensors, work: Tensors) -> None:
        """P = H_g M alone."""
        raise NotImplementedError

    @staticmethod
    def update(part: Part, verdict: Verdict, with_activations: bool) -> None:
        """Steps 6 to 8, and step 9 in the same call if ``with_activations`` (for "ema" alone)."""
        raise NotImplementedError


class ActivationMatrix(Factor):
    """H_a; with hessian_action="ema" also A. Before the start H_a, or A, is an average of X~'X~/m.

    ========= ========= ===============================
    A         n_a x n_a activation factor ("ema" alone)
    H_a       n_a x n_a inverse activation factor
    v, lam_a  scalar    mean square input, and the damping made of it (relative_damping)
    ========= ========= ===============================
    """

    vectors = ("a_bar",)
    spare: torch.Tensor | None = None  # the average on a rank that does not own the layer

    def block_shapes(self, real: torch.dtype) -> Shapes:
        names = ("H_a", "A") if self.settings.keep_A else ("H_a",)
        shapes = super().block_shapes(real) | dict.fromkeys(names, ((self.n, self.n), real))
        if self.settings.relative_damping:
            shapes |= dict.fromkeys(("v", "lam_a"), ((), torch.float64))
        return shapes

    @property
    def average(self) -> torch.Tensor:
        """Where X~'X~/m is averaged before the start."""
        kept = self.kept.get("A" if self.settings.keep_A else "H_a", self.spare)
        if kept is None:
            kept = self.spare = self["a_bar"].new_zeros(*self.stack, self.n, self.n)
        return kept

    def damping(self, given: torch.Tensor) -> torch.Tensor:
        """lam_a, that of all blocks unless they have their own."""
        return self.kept.get("lam_a", given)

    def moved(self) -> torch.Tensor:
        """Step 9's s = H_a a_bar."""
        return times(self["H_a"], self["a_bar"])

    def start(self, lam: torch.Tensor) -> None:
        """H_a = inv(A_0 + lam_a*I), from the average that the warm start or first batch left.

        The one O(n^3) operation of a run, in float64: its condition is that of A_0/lam_a.
        """
        damped = self.average.to(torch.float64, copy=True)
        _diagonal(damped).add_(lam[..., None])
        root = torch.linalg.cholesky_ex(damped)[0]
        identity, H_a = damped.zero_(), self.kept["H_a"]
        _diagonal(identity).fill_(1.0)
        # Half the time of cholesky_inverse, which LAPACK does on one core; a few columns at a time,
        # so that no third matrix is made.
        width = -(-self.n // 4)
        for out, columns in zip(H_a.split(width, -1), identity.split(width, -1), strict=True):
            out.copy_(torch.cholesky_solve(columns, root))
        del root, identity, damped
        H_a.add_(H_a.mT.clone()).mul_(0.5)

    def average_one(
        self, a_bar: torch.Tensor, inputs: Inputs, decay: float | None, ok: torch.Tensor | None
    ) -> None:
        """Before the start: the minibatch enters the average, which ``decay`` is kept of; None
        leaves the average as it is. a_bar is the mean of the minibatch."""
        A = [] if decay is None else [self.average]
        inputs.average(A, a_bar, decay or 0.0, ok, self.settings.backend)

    @staticmethod
    def precondition_columns(part: Part, M: Tensors, work: Tensors) -> None:
        """P = M H_a alone."""
        P, M, work = (part.columns(matrices) for matrices in (part["P"], M, work))
        ops.kron_precondition_(P, [], M, part.a["H_a"], work, part.backend)

    @staticmethod
    def average_in(part: Part, ok: torch.Tensor) -> None:
        """Step 3: the minibatch enters A, and a_bar is its mean."""
        decay, keep = part.group["stat_decay"], part.settings.keep_A
        if part.in_rows:
            A = part.a["A"] if keep else []
            ops.factor_ema_(A, part.a["a_bar"], part.X(), decay, ok, part.backend)
            return
        for factor, inputs in zip(part.a.factors, part.inputs(), strict=True):
            A = [factor["A"]] if keep else []
            inputs.average(A, factor["a_bar"], decay, ok, part.backend)

    @staticmethod
    def follow(part: Part, verdict: Verdict) -> None:
        """Step 9 by itself, with A's action from the minibatch, or from A if that is kept."""
        if part.settings.keep_A:
            update_activations(part, [], verdict)
        elif part.in_rows:
            update_activations(part, part.X(), verdict)
        else:
            ActivationMatrix._follow_patches(part, verdict)

    @staticmethod
    def _follow_patches(part: Part, verdict: Verdict) -> None:
        s, y, rows = [], [], []
        for factor, inputs in zip(part.a.factors, part.inputs(), strict=True):
            s.append(factor.moved())
            y.append(torch.empty_like(s[-1]))
            inputs.action(s[-1], y[-1], part.backend)
            lam = factor.damping(part.scalars.lam_a).to(s[-1].dtype)
            y[-1].add_(s[-1] * lam[..., None])
            if part.settings.restart_after is not None:
                rows.append(inputs.of_the_same_square(factor["a_bar"]))
        ActivationMatrix.take(part, s, y, rows, verdict)

    @staticmethod
    def take(part: Part, s: Tensors, y: Tensors, X: Tensors, verdict: Verdict) -> None:
        """The gate and update of step 9, by the factor; the trace of ``X`` is for a restart."""
        s, y, X = (part.a.split(tensors) for tensors in (s, y, X))
        H_a, counts, a_bar = (part.a[name] for name in ("H_a", "counts_a", "a_bar"))
        ops.bfgs_update_(H_a, counts, s, y, [], a_bar, verdict.ok, part.backend)
        restart(part, {"a": verdict.order_a}, X)


class GradientMatrix(Factor):
    """H_g, and the moving average of the pair.

    ======== ========= =====================
    H_g      n_g x n_g inverse gradient factor
    s, y     n_g       moving averages of the pair
    ss, yy   scalar    moving averages of its squared changes (relative_damping)
    ======== ========= =====================
    """

    vectors = ("h_change", "g_bar", "g_bar_next")

    def block_shapes(self, real: torch.dtype) -> Shapes:
        own: Shapes = {"H_g": ((self.n, self.n), real), "s": ((self.n,), real)}
        return super().block_shapes(real) | own | {"y": ((self.n,), real)} | self._scales()

    def clear(self) -> None:
        super().clear()
        self._to_identity()

    def reset(self) -> None:
        super().reset()
        self._to_identity()

    def _to_identity(self) -> None:
        if "H_g" in self.kept:  # only the owner of the layer has it
            _diagonal(self.kept["H_g"]).fill_(1.0)

    def start(self, lam: torch.Tensor) -> None:
        """H_g = gamma*I."""
        if "H_g" in self.kept:
            _start_scale(_diagonal(self.kept["H_g"]), self.settings.initial_scale, lam)

    @staticmethod
    def precondition(part: Part, M: Tensors, work: Tensors) -> None:
        P, M, work = (part.tiles(matrices) for matrices in (part["P"], M, work))
        H_g, H_a = part.tile_factors()
        ops.kron_precondition_(P, H_g, M, H_a, work, part.backend)

    @staticmethod
    def precondition_rows(part: Part, M: Tensors, work: Tensors) -> None:
        P, M, work = (part.rows(matrices) for matrices in (part["P"], M, work))
        ops.kron_precondition_(P, part.g["H_g"], M, [], work, part.backend)

    @staticmethod
    def update(part: Part, verdict: Verdict, with_activations: bool) -> None:
        update_matrices(part, verdict, with_activations)


class PairRing(Factor):
    """The last p pairs, from which H_g is applied.

    ========= ======= ===========================================================
    S, Y      p x n_g the ring of pairs
    rho       p       1/s'y of each
    pushed    scalar  pairs pushed so far
    gamma     scalar  H_g is gamma times what the ring says (initial_scale other than 1)
    s, y      n_g     moving averages of the pair
    ss, yy    scalar  moving averages of its squared changes (relative_damping)
    ========= ======= ===========================================================

    The ring starts from I. To start from gamma*I it holds the pairs (s, gamma*y), and H_g is gamma
    times what it says: gamma goes into H_g y and the size of the step, and no matrix is scaled.
    """

    own_vectors = ("s_damped", "y_damped", "Hy")
    vectors = ("h_change", "g_bar", "g_bar_next", *own_vectors)

    def block_shapes(self, real: torch.dtype) -> Shapes:
        p = self.settings.memory
        assert p is not None
        shapes: Shapes = super().block_shapes(real)
        shapes |= dict.fromkeys(("S", "Y"), ((p, self.n), real))
        shapes |= {"rho": ((p,), real), "pushed": ((), torch.int64)}
        shapes |= dict.fromkeys(("s", "y"), ((self.n,), real))
        if self.settings.initial_scale != 1.0:
            shapes["gamma"] = ((), real)
        return shapes | self._scales()

    def start(self, lam: torch.Tensor) -> None:
        """gamma, where it is kept."""
        if "gamma" in self.kept:
            _start_scale(self.kept["gamma"], self.settings.initial_scale, lam)

    @staticmethod
    def precondition(part: Part, M: Tensors, work: Tensors) -> None:
        """P = H_g (M H_a), layer after layer on the CPU, where all share the scratch."""
        if work[0].device.type == "cpu":
            for one, m, w in zip(part.one_by_one(), M, work, strict=True):
                PairRing._precondition(one, [m], [w])
        else:
            PairRing._precondition(part, M, work)

    @staticmethod
    def _precondition(part: Part, M: Tensors, work: Tensors) -> None:
        P = part["P"]
        Q, M, unused = (part.columns(matrices) for matrices in (work, M, P))
        ops.kron_precondition_(Q, [], M, part.a["H_a"], unused, part.backend)
        PairRing.apply(part, part.rows(P), part.rows(work))

    @staticmethod
    def precondition_rows(part: Part, M: Tensors, work: Tensors) -> None:
        PairRing.apply(part, part.rows(part["P"]), part.rows(M))

    @staticmethod
    def apply(part: Part, out: Tensors, Q: Tensors) -> None:
        """out = H_g Q, without gamma."""
        S, Y, rho, pushed = (part.g[name] for name in ("S", "Y", "rho", "pushed"))
        ops.lbfgs_two_loop_(out, Q, S, Y, rho, pushed, "auto", part.backend)

    @staticmethod
    def update(part: Part, verdict: Verdict, with_activations: bool) -> None:
        if with_activations:
            ActivationMatrix.follow(part, verdict)
        g, ok = part.g, verdict.ok_pair
        s, y, Hy, counts, c = (
            g[name] for name in ("s_damped", "y_damped", "Hy", "counts_g", "g_bar")
        )
        gamma = g["gamma"] if g.has("gamma") else []
        ops.pair_ema_(
            s=g["s"],
            y=g["y"],
            h_change=g["h_change"],
            g_bar=c,
            g_bar_next=g["g_bar_next"],
            decay=part.group["pair_decay"],
            ok=ok,
            backend=part.backend,
        )
        torch._foreach_copy_(s + y, g["s"] + g["y"])
        PairRing.apply(part, Hy, y)
        if gamma:
            torch._foreach_mul_(Hy, gamma)
        lam_g = part.lam_g()
        ops.double_damping_(s, y, Hy, counts, [], lam_g, part.group["powell"], ok, part.backend)
        if gamma:  # c too, so that the gate is that of (s, y); Hy has done its duty
            torch._foreach_copy_(Hy, c)
            c = Hy
            torch._foreach_mul_(y + c, gamma + gamma)
        S, Y, rho, pushed = (g[name] for name in ("S", "Y", "rho", "pushed"))
        ops.lbfgs_push_(S, Y, rho, pushed, counts, s, y, c, ok, part.backend)
        restart(part, {"g": verdict.order_g})


def times(H: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """H v, or of a stack each one's."""
    return torch.bmm(H, v[..., None])[..., 0] if H.dim() == 3 else H @ v


def _diagonal(H: torch.Tensor) -> torch.Tensor:
    return H.diagonal(dim1=-2, dim2=-1)


def _start_scale(place: torch.Tensor, gamma: float | str, lam_g: torch.Tensor) -> None:
    if isinstance(gamma, str):
        place.copy_(1 / lam_g)
    else:
        place.fill_(gamma)
