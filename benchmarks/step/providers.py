"""Who takes the steps: the eager reference, our backends, and what people use instead."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import optimizers
from benchmarks.baselines.kfac import INVERSE_EVERY
from benchmarks.models import Loss
from benchmarks.optimizers import SOAP_BASIS_EVERY
from benchmarks.optimizers import Settings as Asked
from benchmarks.step.captured import BEFORE_REPLAYS
from benchmarks.step.models import Model
from kbfgs_ext import KBFGS, KBFGSL, presets
from kbfgs_ext.ops import registry
from kbfgs_ext.optim.fallback import default_fallback
from kbfgs_ext.optim.settings import Settings

WEIGHT_DECAY = 1e-5  # the paper's
LR = 1e-4  # of all but ours, which look after themselves: no network blows up under the clock
EAGER = "eager K-BFGS, ema, full second pass"
PAPER = optimizers.options_of({"safeguard": True, "restart_after": 10}, presets.PUBLISHED)
GRAPH = ", graph"  # ends the name of a captured step
# What a user has: a GPU's own choice, op by op, and the same without the compiled extension.
CHOICES = {"cpu": ("cpu",), "cuda": ("auto", "triton")}

Make = Callable[[nn.Module, Loss], Any]


@dataclass(frozen=True)
class Provider:
    """A named way to take a step."""

    name: str
    make: Make  # its optimizer
    missing: str | None = None  # why it cannot run here
    period: int = 1  # steps, of unequal cost, whose mean is one reading
    captured: bool = False
    scales: bool = True  # a gradient scaler can step it

    @property
    def warm_up(self) -> int:
        """Steps before any is counted, which make state and a graph; counted ones fill caches."""
        return BEFORE_REPLAYS if self.captured else 1

    def answers(self, words: Collection[str]) -> bool:
        """Whether the name holds one of ``words``."""
        return any(word.lower() in self.name.lower() for word in words)


def providers(device: torch.device) -> tuple[Provider, ...]:
    """All of them on ``device``, the eager reference first."""
    eager = optimizers.options_of({"backend": "reference", "freeze_second_pass": False}, PAPER)
    return (
        Provider(EAGER, _ours(KBFGS, **eager)),
        Provider(
            "eager K-BFGS, minibatch, full",
            _ours(KBFGS, **eager | {"hessian_action": "minibatch"}),
        ),
        *itertools.chain.from_iterable(_backend(name, device) for name in CHOICES[device.type]),
        *_ordinary(device),
        Provider("Muon", _built("muon"), scales=False),
        Provider(
            "SOAP",
            _built("soap"),
            missing=optimizers.missing("soap"),
            period=SOAP_BASIS_EVERY,
            scales=False,
        ),
        Provider("K-FAC", _kfac, period=INVERSE_EVERY, scales=False),
    )


def chosen(
    everyone: Sequence[Provider],
    words: Collection[str],
    model: Model,
    device: torch.device,
    patient: bool = False,
    scaled: bool = False,
) -> tuple[list[Provider], dict[str, str]]:
    """Those whose name holds one of ``words``, all without any, and who of them is left out, why.

    The eager reference is always among them: ratios are to it. What takes long on ``model`` is
    left out unless one is ``patient`` or has asked for it by ``words``; what no gradient scaler
    steps, where losses are ``scaled``.
    """
    short = model.long if device.type == "cpu" and not patient and not words else ()
    able, left_out = [], {}
    for provider in everyone:
        if provider.name != EAGER and words and not provider.answers(words):
            continue
        reason = provider.missing or model.senseless.get(provider.name)
        if reason is None and scaled and (provider.captured or not provider.scales):
            reason = "no gradient scaler steps it"
        if reason is None and provider.name in short:
            reason = f"its {provider.period} steps take minutes on a CPU (--all, or ask for it)"
        if reason is None:
            able.append(provider)
        else:
            left_out[provider.name] = reason
    return able, left_out


def _backend(backend: str, device: torch.device) -> list[Provider]:
    """The paper's methods with both Hessian actions, and the defaults, on one backend; on a GPU
    also captured."""
    on_gpu = device.type == "cuda"
    label = f", {backend}" if on_gpu else ""  # a CPU has but the one
    kinds: list[tuple[str, dict[str, Any], int]] = [
        (action, PAPER | {"hessian_action": action}, 1) for action in ("ema", "minibatch")
    ]
    kinds.append(("defaults", {}, Settings.pair_every))
    return [
        Provider(
            f"{title}, {kind}{label}{GRAPH if captured else ''}",
            _ours(method, **options, backend=backend),
            missing=unavailable(backend),
            period=period,
            captured=captured,
        )
        for title, method in (("K-BFGS", KBFGS), ("K-BFGS(L)", KBFGSL))
        for kind, options, period in kinds
        for captured in ((False, True) if on_gpu else (False,))
    ]


def _ordinary(device: torch.device) -> list[Provider]:
    found = [Provider("AdamW, fused", _built("adamw")), Provider("SGD, fused", _built("sgdm"))]
    if device.type == "cuda":
        found.insert(1, Provider("AdamW, fused" + GRAPH, _capturable_adamw, captured=True))
        found.append(Provider("SGD, fused" + GRAPH, _built("sgdm"), captured=True))
    return found


def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot run here, or None; "auto" is that of the extension and Triton."""
    if backend == "auto":
        return unavailable("cuda") or unavailable("triton")
    reasons = (registry.implementation(op, backend).unavailable() for op in registry.ops())
    return next((reason for reason in reasons if reason is not None), None)


def _ours(method: type[KBFGS], **options: Any) -> Make:
    def make(model: nn.Module, loss: Loss) -> KBFGS:
        # Named, so that it takes norms without a warning.
        opt = method(model, weight_decay=WEIGHT_DECAY, fallback=default_fallback, **options)
        if isinstance(opt, KBFGSL):
            fill_memory(opt)
        return opt

    return make


def fill_memory(opt: KBFGSL) -> None:
    """Let all pairs of the memory be there, as they are after that many steps: a step's cost grows
    with them. Of s = y the factor stays the identity."""
    opt.steps.parts.materialize()
    for ring in [factor for layer in opt.layers for factor in layer.gradients]:
        pairs = F.normalize(torch.randn_like(ring["S"]), dim=1)
        ring["S"].copy_(pairs)
        ring["Y"].copy_(pairs)
        ring["rho"].fill_(1.0)
        ring["pushed"].fill_(len(pairs))


def _built(name: str) -> Make:
    settings = optimizers.settle(name, Asked(lr=LR))
    return lambda model, loss: optimizers.build(name, model, settings, WEIGHT_DECAY, loss)


def _capturable_adamw(model: nn.Module, loss: Loss) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True, capturable=True
    )


def _kfac(model: nn.Module, loss: Loss) -> torch.optim.Optimizer:
    """K-FAC past its first steps, all of which make inverses: from here on one in a period does."""
    opt = _built("kfac")(model, loss)
    opt.steps = INVERSE_EVERY
    return opt
