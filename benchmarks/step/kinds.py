"""What a layer of each kind asks of a GPU in a step, beside the passes' own: launches and bytes.

``python -m benchmarks.step.kinds``. Networks of one layer on tensors without values, at the
defaults; counted as in prediction.py, not measured. What a step launches for all layers together
(what is sound, lengths, the safeguard) is in every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step import prediction
from benchmarks.step.models import Model
from benchmarks.tables import RESULTS, markdown
from kbfgs_ext import KBFGS
from kbfgs_ext.bench.measure import load, store

OUT = RESULTS / "kinds.jsonl"
BACKENDS = ("auto", "cuda", "triton")  # "auto": what is taken on a GPU that has both
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """A network of one layer; ``shape`` is that of one input."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 64
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class Attention(nn.Module):
    """Self-attention alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, width), and as it comes out."""
        return self.attention(x, x, x, need_weights=False)[0]


KINDS = (
    LayerKind(
        "Linear, 1024 to 1024, factors whole", lambda: nn.Linear(1024, 1024), (1024,), 1024,
        {"block_size": None},
    ),
    LayerKind(
        "the same in blocks of 256", lambda: nn.Linear(1024, 1024), (1024,), 1024,
        {"block_size": 256},
    ),
    LayerKind("Linear, 256 to 32,000", lambda: nn.Linear(256, 32_000), (256,), 1024),
    LayerKind(
        "Conv2d, 128 to 128, 3 x 3", lambda: nn.Conv2d(128, 128, 3, padding=1), (128, 16, 16)
    ),
    LayerKind(
        "the same in 32 groups", lambda: nn.Conv2d(128, 128, 3, padding=1, groups=32), (128, 16, 16)
    ),
    LayerKind(
        "Conv2d, 384, 7 x 7, depthwise",
        lambda: nn.Conv2d(384, 384, 7, padding=3, groups=384),
        (384, 8, 8),
    ),
    LayerKind(
        "ConvTranspose2d, 128 to 64, 4 x 4", lambda: nn.ConvTranspose2d(128, 64, 4, 2, 1),
        (128, 8, 8),
    ),
    LayerKind("MultiheadAttention, 256", lambda: Attention(256), (64, 256)),
)  # fmt: skip


def _size(outputs: Tensor, inputs: Tensor) -> Tensor:
    return outputs.square().sum() / len(outputs)


def row(kind: LayerKind) -> Row:
    """Its blocks, and for every set of backends what a step launches and moves: with a second pass,
    and without."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = KBFGS(kind.build(), **kind.options).layers
    sides = [[f.count for f in side] for x in layers for side in (x.gradients, x.activations)]
    found: Row = {
        "layer": kind.title,
        "input": [kind.batch, *kind.shape],
        "layers": len(layers),
        "blocks_g": sum(map(sum, sides[0::2])),
        "blocks_a": sum(map(sum, sides[1::2])),
        "factor_bytes": sum(
            4 * f.count * f.n**2 for x in layers for f in (*x.gradients, *x.activations)
        ),
    }
    model = Model(kind.title, kind.build, kind.shape, _size, kind.batch)
    for backend in BACKENDS:
        kinds = prediction.steps(model, kind.options | {"pair_every": 2}, backend)
        own = [kinds[paired].own for paired in (True, False)]
        found[backend] = [sum(k.launches for k in kernels) for kernels in own]
        found["bytes"] = [sum(k.bytes for k in kernels) for kernels in own]
    return found


HEADS = ["layer", "input", "blocks of g, a", "factors, MB", "kernels", "MB", "CUDA alone"]


def table() -> str:
    """The rows as Markdown."""
    body = [
        [
            row["layer"],
            " x ".join(map(str, row["input"])),
            f"{row['blocks_g']}, {row['blocks_a']}",
            f"{row['factor_bytes'] / 1e6:.1f}",
            " / ".join(map(str, row["auto"])),
            " / ".join(f"{n / 1e6:.0f}" for n in row["bytes"]),
            *(" / ".join(map(str, row[backend])) for backend in BACKENDS[1:]),
        ]
        for row in load(OUT)
    ]
    return markdown([*HEADS, "Triton alone"], body)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.kinds", description=__doc__)
    parser.add_argument("--json", type=Path, default=OUT, help="where the rows go")
    args = parser.parse_args(arguments)
    for kind in KINDS:
        store(args.json, [row(kind)], ("layer",))
        print(kind.title)


if __name__ == "__main__":
    main()
