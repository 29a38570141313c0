"""What is covered of networks that people train: ``python -m benchmarks.coverage``.

Networks of torchvision, timm and transformers, built without weights, with a batch of 16 random
images of 32 x 32, or of 16 random sequences of 32 tokens, unless the name says more. A row per
network: the share of trained parameters in covered layers, the bytes of the factors, and seconds of
a step of fused AdamW, of K-BFGS's first step, which starts the factors, and of a later one. A
network whose package is not installed is left out with its name. ``pip install ".[networks]"`` has
them all. On a GPU a later step is one as a CUDA graph too, where the network has no dropout.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step.captured import captured
from kbfgs_ext import KBFGS
from kbfgs_ext.bench.environment import environment
from kbfgs_ext.bench.measure import load, store

OUT = Path(__file__).resolve().parent / "results" / "coverage.jsonl"
BATCH, IMAGE, TOKENS, CLASSES = 16, 32, 32, 10
MADE_BY = 30  # steps after which both graphs are there, of steps with a second pass and without
Batch = tuple[Tensor, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A network of a package.

    ``build`` takes the package; ``vocabulary`` is that of a language model, None of one for images;
    ``size`` is the batch's.
    """

    name: str
    package: str
    build: Callable[[Any], nn.Module]
    vocabulary: int | None = None
    size: int = BATCH

    def batch(self, device: torch.device) -> Batch:
        """Random inputs and targets."""
        if self.vocabulary is not None:
            tokens = torch.randint(self.vocabulary, (self.size, TOKENS)).to(device)
            return tokens, tokens
        images = torch.randn(self.size, 3, IMAGE, IMAGE)
        return images.to(device), torch.randint(CLASSES, (self.size,)).to(device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        x, target = batch
        if self.vocabulary is not None:
            return model(input_ids=x, labels=target).loss
        return nn.functional.cross_entropy(model(x), target)


def _gpt2(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def _llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=64, intermediate_size=172, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _bert(transformers: Any) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
    )
    return transformers.BertForMaskedLM(config)


def _torchvision(name: str) -> Callable[[Any], nn.Module]:
    return lambda torchvision: getattr(torchvision.models, name)(num_classes=CLASSES)


def _timm(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda timm: timm.create_model(name, num_classes=CLASSES, **options)


NETWORKS = [
    Network("resnet18", "torchvision", _torchvision("resnet18")),
    Network("resnet18, batch 128", "torchvision", _torchvision("resnet18"), size=128),
    Network("resnet50", "torchvision", _torchvision("resnet50")),
    Network("convnext_tiny", "torchvision", _torchvision("convnext_tiny")),
    Network("mobilenet_v2", "torchvision", _torchvision("mobilenet_v2")),
    Network("vit_tiny", "timm", _timm("vit_tiny_patch16_224", img_size=IMAGE, patch_size=4)),
    Network("mixer_s16", "timm", _timm("mixer_s16_224", img_size=IMAGE)),
    Network("GPT-2, 2 layers of 64", "transformers", _gpt2, 50_257),
    Network("Llama, 2 layers of 64", "transformers", _llama, 32_000),
    Network("BERT, 2 layers of 64", "transformers", _bert, 30_522),
]


def measure(network: Network, package: Any, steps: int, device: torch.device) -> Row:
    """The row of a network; AdamW takes ``steps`` steps, and K-BFGS as many after its first."""
    torch.manual_seed(0)
    batch = network.batch(device)

    def made() -> nn.Module:
        torch.manual_seed(0)
        return network.build(package).train().to(device)

    model = made()
    on_gpu = device.type == "cuda"
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=on_gpu)
    plain = _seconds(network, model, adamw, batch, 1 + steps)
    replays = {"adamw_captured": _replay(network, model, adamw, batch, steps)}
    del adamw
    model = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what it leaves to the fallback
        opt = KBFGS(model)
    report = opt.coverage()
    row: Row = {
        "network": network.name,
        "package": f"{network.package} {importlib.metadata.version(network.package)}",
        "batch": list(batch[0].shape),
        "setting": "defaults",
        "parameters": sum(row.parameters for row in report),
        "layers": sum(row.covered for row in report),
        "share": report.share,
        "factor_bytes": report.factor_bytes,
        "not_covered": _by_reason(report),
        "bytes": opt.memory_usage()["total"],
    }
    seconds = _seconds(network, model, opt, batch, 1 + steps)
    replays["later_captured"] = _replay(network, model, opt, batch, steps)
    if on_gpu:
        row |= replays
    return row | {
        "adamw_seconds": statistics.median(plain[1:]),
        "first_seconds": seconds[0],
        "later_seconds": statistics.fmean(seconds[1:]),
        "steps": steps,
        "load": os.getloadavg()[0],
    }


def _by_reason(report: Any) -> dict[str, float]:
    """Shares of the parameters that are not covered, the largest first."""
    total = sum(row.parameters for row in report)
    shares: dict[str, float] = {}
    for row in report:
        if not row.covered:
            shares[row.reason] = shares.get(row.reason, 0.0) + row.parameters / total
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _seconds(
    network: Network, model: nn.Module, opt: torch.optim.Optimizer, batch: Batch, steps: int
) -> list[float]:
    """Of each step on one batch."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = network.loss(model, batch)
        loss.backward()
        return loss

    taken = []
    for _ in range(steps):
        _wait(batch)
        begin = time.perf_counter()
        opt.step(closure)
        _wait(batch)
        taken.append(time.perf_counter() - begin)
    return taken


def _wait(batch: Batch) -> None:
    if batch[0].is_cuda:
        torch.cuda.synchronize()


def _replay(
    network: Network, model: nn.Module, opt: torch.optim.Optimizer, batch: Batch, steps: int
) -> float | None:
    """Seconds of a step as a CUDA graph; None without a GPU, or where there is dropout."""
    x, target = batch
    if not x.is_cuda or any(
        getattr(m, "p", 0) or getattr(m, "drop_prob", 0) for m in model.modules()
    ):
        return None
    step = captured(opt, lambda x: network.loss(model, (x, target)))
    for _ in range(MADE_BY):
        step(x)
    _wait(batch)
    begin = time.perf_counter()
    for _ in range(steps):
        step(x)
    _wait(batch)
    return (time.perf_counter() - begin) / steps


def table() -> str:
    """The rows as Markdown."""
    rows = [row for row in load(OUT) if row["device_type"] == "cpu"]
    heads = ["network", "parameters", "layers", "covered", "factors, MiB", "AdamW, s", "first, s"]
    lines = [[*heads, "later, s", "most of the rest"], ["---", *["---:"] * 7, "---"]]
    for row in rows:
        rest = next(iter(row["not_covered"].items()), None)
        lines.append(
            [
                row["network"],
                f"{row['parameters'] / 1e6:.1f} M",
                str(row["layers"]),
                f"{row['share']:.1%}",
                f"{row['factor_bytes'] / 2**20:.0f}",
                *(f"{row[name + '_seconds']:.2f}" for name in ("adamw", "first", "later")),
                "–" if rest is None else f"{rest[1]:.1%}: {rest[0]}",
            ]
        )
    text = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    places: dict[str, list[Row]] = {}
    for row in rows:
        where = f"{row['cpu']}, {row['threads']} threads, torch {row['torch']}"
        places.setdefault(where, []).append(row)
    for where, same in places.items():
        packages = ", ".join(dict.fromkeys(row["package"] for row in same))
        loads = [row["load"] for row in same if row["shared_machine"]]
        text += f"\n{where}; {packages}.\n"
        if loads:
            text += (
                "Timed on a machine with other work on it, of a load of"
                f" {min(loads):.0f} to {max(loads):.0f}: rough numbers.\n"
            )
    return text


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--networks", nargs="*", help="words in the names of those to measure")
    parser.add_argument("--steps", type=int, default=10, help="later steps that are timed")
    parser.add_argument("--shared", action="store_true", help="the machine has other work to do")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, default=OUT, help="where the rows go")
    args = parser.parse_args(arguments)
    for network in NETWORKS:
        if args.networks and not any(word in network.name for word in args.networks):
            continue
        try:
            package = importlib.import_module(network.package)
        except ImportError:
            print(f"{network.name}: left out, {network.package} is not installed")
            continue
        row = measure(network, package, args.steps, args.device)
        row |= {"shared_machine": args.shared} | environment(args.device)
        store(args.json, [row], ("network", "device_type"))
        print(
            f"{network.name}: {row['share']:.1%} of {row['parameters'] / 1e6:.1f} M covered,"
            f" {row['factor_bytes'] / 2**20:.0f} MiB of factors; a step of AdamW"
            f" {row['adamw_seconds']:.2f} s, the first {row['first_seconds']:.2f}, later ones"
            f" {row['later_seconds']:.2f}"
        )


if __name__ == "__main__":
    main()
