"""Which rank makes the steps of which layers, and whether that pays: a cost model.

Sizes alone decide, so all ranks come to the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kbfgs_ext.optim.covered import CoveredLayer

# From here on "auto" shares: FLOPs that a rank is spared for each byte of P that is sent. As of a
# device with 50 TFLOP/s and a link of 50 GB/s; assumed, and not measured on any.
FLOPS_PER_BYTE = 1000


def cost(layer: CoveredLayer) -> int:
    """The FLOPs that an owner does for a layer and the others do not, by their leading terms: the
    product of M and the longer side's factor, P's polar factor by four products of n x k x k and 16
    of k x k, and the updates of both factors."""
    n_g, n_a = layer.n_g, layer.n_a
    b_g, b_a = (max(f.n for f in side) for side in (layer.gradients, layer.activations))
    groups = layer.groups
    k, n = sorted((n_g // groups, n_a))
    polar, updates = 4 * n * k**2 + 16 * k**3, 8 * n_a * b_a
    product = 2 * n_g * n_a * (b_g if layer.tall else b_a)
    return product + groups * (polar + updates) + 8 * n_g * b_g


def share_out(costs: Sequence[int], loads: list[int]) -> list[int]:
    """Who takes what: the costliest first, each to whom has the least so far; adds to ``loads``."""
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


@dataclasses.dataclass(frozen=True)
class Shares:
    """What it means for some ranks to share the work of some layers.

    Args:
        ranks: how many.
        flops: of all layers, in a step.
        most: of these, what the rank does that has the most: the others wait for it.
        sent: bytes of P.
        kept: bytes that the owner of a layer keeps alone, of all layers.
        heaviest: of these, what the rank keeps that has the most.
    """

    ranks: int
    flops: int
    most: int
    sent: int
    kept: int
    heaviest: int

    @classmethod
    def of(cls, layers: Sequence[CoveredLayer], ranks: int) -> Shares:
        """Of the ``layers``, taken all at once."""
        costs, loads, kept = [cost(layer) for layer in layers], [0] * ranks, [0] * ranks
        for layer, owner in zip(layers, share_out(costs, loads), strict=True):
            kept[owner] += layer.owned_bytes
        sent = sum(layer.n_g * layer.n_a * layer.dtype.itemsize for layer in layers)
        return cls(ranks, sum(costs), max(loads), sent, sum(kept), max(kept))

    @property
    def spared(self) -> float:
        """FLOPs that every rank is spared, for each byte of P."""
        return (self.flops - self.most) / max(self.sent, 1)

    @property
    def pays(self) -> bool:
        """Whether "auto" shares."""
        return self.spared >= FLOPS_PER_BYTE

    def __str__(self) -> str:
        free, whole, sent = (n / 2**20 for n in (self.kept - self.heaviest, self.kept, self.sent))
        return (
            f"shared by {self.ranks} ranks, each is spared {1 - self.most / max(self.flops, 1):.0%}"
            f" of {self.flops:.2g} FLOPs a step and {free:.1f} of {whole:.1f} MiB of factors and"
            f" momentum, for {sent:.1f} MiB of P that are sent: {self.spared:.0f} FLOPs a byte,"
            f' and shared_work="auto" shares from {FLOPS_PER_BYTE}'
        )
