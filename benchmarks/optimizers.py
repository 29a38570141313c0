"""The optimizers that are compared, and the settings each one starts from."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.kfac import KFAC
from benchmarks.models import Loss
from kbfgs_ext import DirectionRule, FactorRule, Precision, RankRule, SafeguardRule, presets
from kbfgs_ext.bench.precision import PRECISIONS
from kbfgs_ext.optim.hyper import MOVED

CAPTURED = ("kbfgs", "kbfgsl", "adamw")  # CUDA graphs can take their steps
QUASI_NEWTON = ("kbfgs", "kbfgsl")
SCALED = (*CAPTURED, "sgdm", "rmsprop")  # a gradient scaler can step them
PRESETS = {"published": presets.PUBLISHED, "tuned": presets.TUNED}
SOAP_BASIS_EVERY = 10  # steps between new eigenbases: the SOAP paper's, heavyball's own is 2


class SettingsError(ValueError):
    """A setting that the chosen optimizer does not know or cannot take."""


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of one optimizer; None where the optimizer has no such thing.

    The names are those of the ``KBFGS`` constructor and of its rules' fields, flat, as `options_of`
    takes them. The same class carries what a user asks for, where None means: as in
    :data:`DEFAULTS`.
    """

    preset: str | None = None  # of kbfgs_ext.presets, under what else is given
    lr: float | None = None
    momentum: float | None = None
    damping: float | None = None
    damping_a: float | None = None
    damping_g: float | None = None
    pair_decay: float | None = None
    initial_scale: float | str | None = None
    step_length: str | None = None
    memory: int | None = None
    hessian_action: str | None = None
    backend: str | None = None
    safeguard: bool | SafeguardRule | None = None
    master_weights: bool | None = None

    def given(self) -> dict[str, Any]:
        """The settings that are not None."""
        # Not asdict, which would turn a SafeguardRule into a dict.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def options_of(words: Mapping[str, Any], preset: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of the ``KBFGS`` constructor for the flat ``words`` over a ``preset``.

    Grids, command lines and rows name a setting by flat words: rows outlive the constructor's form.
    """
    made = dict(preset or {})
    own: dict[str, dict[str, Any]] = {}
    for word, value in words.items():
        if word in MOVED:
            argument, _, field = MOVED[word]
            own.setdefault(argument, {})[field] = value
        else:
            made[word] = value
    rules = {
        "direction": DirectionRule.of(made.get("direction", "spectral")),
        "factors": made.get("factors", FactorRule()),
        "precision": made.get("precision", Precision()),
        "ranks": made.get("ranks", RankRule()),
    }
    return made | {argument: replace(rules[argument], **own[argument]) for argument in own}


# Starting points of single runs. Comparisons tune each optimizer over its grid (grids.py).
DEFAULTS: dict[str, Settings] = {
    "kbfgs": Settings(),  # the constructor's
    "kbfgsl": Settings(
        memory=100,  # the paper's
    ),
    "adamw": Settings(
        lr=3e-3,
    ),
    "sgdm": Settings(
        lr=3e-3,
        momentum=0.9,  # as in the paper's comparison
    ),
    "rmsprop": Settings(
        lr=3e-4,
    ),
    "muon": Settings(
        lr=3e-3,  # AdamW's, to whose scale the update is brought
        momentum=0.95,  # Muon's own default
    ),
    "soap": Settings(
        lr=3e-3,  # heavyball's own default
    ),
    "kfac": Settings(
        lr=1.0,  # the paper's MNIST setting
        damping=3.0,  # the paper's MNIST setting
        momentum=0.9,  # the paper's
    ),
}

NAMES = tuple(DEFAULTS)


def missing(name: str) -> str | None:
    """Why ``name`` cannot be built here, or None if it can."""
    if name == "soap" and importlib.util.find_spec("heavyball") is None:
        return "SOAP needs heavyball (pip install heavyball)"
    return None


def check_scaled(name: str, precision: str, captured: bool) -> None:
    """Raise where losses are to be scaled and ``name`` has no such step."""
    if not PRECISIONS[precision].scaled:
        return
    if name not in SCALED:
        raise SettingsError(f"no gradient scaler steps {name}: only {', '.join(SCALED)}")
    if captured:
        raise SettingsError(f"no graph takes a gradient scaler: {precision} cannot be captured")


def settle(name: str, asked: Settings) -> Settings:
    """The settings that ``name`` runs with: what was asked for over what is in the table."""
    if name not in DEFAULTS:
        raise SettingsError(f"unknown optimizer {name!r}, expected one of {', '.join(NAMES)}")
    default = DEFAULTS[name]
    known = {field.name for field in fields(Settings)}
    if name not in QUASI_NEWTON:
        known = set(default.given())
    elif name != "kbfgsl":
        known -= {"memory"}
    unknown = sorted(set(asked.given()) - known)
    if unknown:
        raise SettingsError(f"{name} has no setting {', '.join(unknown)}")
    return Settings(**(default.given() | asked.given()))


def build(
    name: str,
    model: nn.Module,
    settings: Settings,
    weight_decay: float,
    loss: Loss,
    captured: bool = False,
) -> torch.optim.Optimizer | MuonWithAdamW:
    """The optimizer ``name`` over all parameters of ``model``, with settled ``settings``.

    ``weight_decay`` is added to the gradient (kbfgs, kbfgsl, kfac, sgdm, rmsprop) or decoupled and
    so multiplied by the learning rate (adamw, muon, soap). ``loss`` tells K-FAC which distribution
    the outputs stand for. All of them are stepped by ``step(closure)``, and those of `CAPTURED` may
    be stepped by a CUDA graph if ``captured`` says so.
    """
    reason = missing(name)
    if reason is not None:
        raise SettingsError(reason)
    if captured and name not in CAPTURED:
        raise SettingsError(f"no graph follows the schedule of {name}: only {', '.join(CAPTURED)}")
    options = settings.given() | {"weight_decay": weight_decay}
    if name in QUASI_NEWTON:
        import kbfgs_ext

        preset = PRESETS[options.pop("preset")] if "preset" in options else {}
        method = kbfgs_ext.KBFGS if name == "kbfgs" else kbfgs_ext.KBFGSL
        return method(model, **options_of(options, preset))
    if name == "kfac":
        return KFAC(model, loss, **options)
    if name == "muon":
        return MuonWithAdamW(model, **options)
    if name == "soap":
        return soap(model, **options)
    if name == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), **options)
    # Fused: one pass over the parameters, the fastest that torch has on CPU and GPU alike.
    if captured:
        device = next(model.parameters()).device
        options |= {"capturable": True, "lr": torch.tensor(options["lr"], device=device)}
    method = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    return method(model.parameters(), fused=True, **options)


def soap(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """SOAP, which is Adam in the eigenbasis of Shampoo's factors, from the heavyball package."""
    import heavyball

    # Its torch.compile with autotuning takes longer than a minute, out of a run's few.
    heavyball.utils.compile_mode = None
    return heavyball.SOAP(
        model.parameters(),
        lr=lr,
        weight_decay=weight_decay,
        precondition_frequency=SOAP_BASIS_EVERY,
    )


def resolved(name: str, optimizer: Any, settings: Settings) -> dict[str, Any]:
    """Everything ``optimizer`` was built with: ``settings`` over its constructor's defaults."""
    found = dict(optimizer.defaults)
    if name in QUASI_NEWTON:  # what holds for all parameter groups ``defaults`` does not have
        found |= {f.name: getattr(optimizer.settings, f.name) for f in fields(optimizer.settings)}
    return {k: v for k, v in (found | settings.given()).items() if v is not None}


def anneal(optimizer: Any, rates: Sequence[float], spent: float) -> None:
    """Half a cosine of every group's lr, from its of ``rates`` to 0 as ``spent``, a share of the
    run, goes from 0 to 1."""
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        rate = lr * (1 + math.cos(math.pi * min(spent, 1.0))) / 2
        if isinstance(group["lr"], Tensor):  # which a graph reads
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class MuonWithAdamW:
    """torch's Muon for the weights of linear layers and convolutions, these as matrices with an
    output a row, and AdamW for everything else, stepped as one.

    Args:
        rest_lr: AdamW's. None: ``lr``, to which Muon's update is scaled, by AdamW's root mean
            square; otherwise Muon's update has its original scale.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        rest_lr: float | None = None,
    ) -> None:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.weights = [m.weight for m in model.modules() if isinstance(m, kinds)]
        taken = {id(p) for p in self.weights}
        others = [p for p in model.parameters() if id(p) not in taken]
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.weights]
        self.muon = torch.optim.Muon(
            self.matrices,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw" if rest_lr is None else "original",
        )
        self.adamw = torch.optim.AdamW(others, lr=rest_lr or lr, weight_decay=weight_decay)

    @property
    def defaults(self) -> dict[str, Any]:
        """The constructor defaults of Muon, which are those of the matrices."""
        return self.muon.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return self.muon.param_groups + self.adamw.param_groups

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.weights:
            p.grad = None
        self.adamw.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step of both from the one gradient that ``closure`` leaves behind."""
        loss = closure()
        for p, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        self.muon.step()
        self.adamw.step()
        return loss
