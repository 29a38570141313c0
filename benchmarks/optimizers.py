"""The optimizers that are compared, and the settings each one starts from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from kbfgs_ext import SafeguardRule

QUASI_NEWTON = ("kbfgs", "kbfgsl")


class SettingsError(ValueError):
    """A setting that the chosen optimizer does not know or cannot take."""


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of one optimizer; None where the optimizer has no such thing.

    The names are those of the ``KBFGS`` constructor. The same class carries what a user asks for,
    where None means: as in :data:`DEFAULTS`.
    """

    lr: float | None = None
    momentum: float | None = None
    damping: float | None = None
    damping_a: float | None = None
    damping_g: float | None = None
    memory: int | None = None
    hessian_action: str | None = None
    backend: str | None = None
    safeguard: bool | SafeguardRule | None = None

    def given(self) -> dict[str, Any]:
        """The settings that are not None."""
        # Not asdict, which would turn a SafeguardRule into a dict.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


# AdamW's is the best of five on the embedded digits (README.md); the other first-order methods have
# starting points that are hardly tuned: give --lr for a fair comparison.
DEFAULTS: dict[str, Settings] = {
    "kbfgs": Settings(
        lr=0.3,  # the paper's MNIST setting
        damping=0.3,  # the paper's MNIST setting
    ),
    "kbfgsl": Settings(
        lr=0.3,  # the paper's MNIST setting
        damping=0.3,  # the paper's MNIST setting
        memory=100,  # the paper's
    ),
    "adamw": Settings(
        lr=3e-3,  # of 0.0005, 0.001, 0.002, 0.003, 0.005 by training loss after 520 steps, seed 0
    ),
    "sgdm": Settings(
        lr=3e-3,  # better of 1e-3 and 3e-3 after 100 steps, seed 0; larger ones were not tried
        momentum=0.9,  # as in the paper's comparison
    ),
    "rmsprop": Settings(
        lr=3e-4,  # trains steadily for 100 steps; no other value was tried
    ),
    "muon": Settings(
        lr=3e-3,  # AdamW's, to whose scale the update is brought; not tried
        momentum=0.95,  # Muon's own default
    ),
}

NAMES = tuple(DEFAULTS)


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
    name: str, model: nn.Module, settings: Settings, weight_decay: float
) -> torch.optim.Optimizer | MuonWithAdamW:
    """The optimizer ``name`` over all parameters of ``model``, with settled ``settings``.

    ``weight_decay`` is added to the gradient (kbfgs, kbfgsl, sgdm, rmsprop) or decoupled and so
    multiplied by the learning rate (adamw, muon). All of them are stepped by ``step(closure)``.
    """
    options = settings.given()
    if name in QUASI_NEWTON:
        import kbfgs_ext

        method = kbfgs_ext.KBFGS if name == "kbfgs" else kbfgs_ext.KBFGSL
        return method(model, weight_decay=weight_decay, **options)
    if name == "muon":
        return MuonWithAdamW(model, weight_decay=weight_decay, **options)
    if name == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), weight_decay=weight_decay, **options)
    # Fused: one pass over the parameters, the fastest that torch has on CPU and GPU alike.
    method = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    return method(model.parameters(), weight_decay=weight_decay, fused=True, **options)


def resolved(name: str, optimizer: Any, settings: Settings) -> dict[str, Any]:
    """Everything ``optimizer`` was built with: ``settings`` over its constructor's defaults."""
    found = dict(optimizer.defaults)
    if name in QUASI_NEWTON:
        import kbfgs_ext

        # These hold for all parameter groups, so that ``defaults`` does not have them.
        parameters = inspect.signature(kbfgs_ext.KBFGS).parameters
        for option in ("hessian_action", "safeguard", "backend"):
            found[option] = parameters[option].default
    return {k: v for k, v in (found | settings.given()).items() if v is not None}


class MuonWithAdamW:
    """Muon for the weight matrices and AdamW for everything else, stepped as one.

    Muon's update is scaled to AdamW's root mean square, so that one learning rate serves both.
    """

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        self.muon = torch.optim.Muon(
            matrices,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)

    @property
    def defaults(self) -> dict[str, Any]:
        """The constructor defaults of Muon, which are those of the matrices."""
        return self.muon.defaults

    def zero_grad(self) -> None:
        """Drop the gradients of both."""
        self.muon.zero_grad()
        self.adamw.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step of both from the one gradient that ``closure`` leaves behind."""
        loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss
