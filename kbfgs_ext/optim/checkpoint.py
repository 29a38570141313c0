"""Checkpoints: checked as a whole before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kbfgs_ext.optim.factors import LayerFactors, Plan

FORMAT = 4


def describe(plan: Plan, layers: list[LayerFactors]) -> dict[str, Any]:
    """What a checkpoint must agree on with the optimizer that loads it."""
    return {
        "format": FORMAT,
        "method": "K-BFGS" if plan.memory is None else "K-BFGS(L)",
        "hessian_action": "ema" if plan.keep_A else "minibatch",
        "memory": plan.memory,
        "max_factor_dim": plan.max_factor_dim,
        "restart_after": plan.restart_after,
        "initial_scale": plan.initial_scale,
        "layers": {layer.name: [layer.n_g, layer.n_a] for layer in layers},
    }


def save_layers(layers: list[LayerFactors]) -> dict[str, dict[str, Any]]:
    """Every layer's kept tensors and host flags, by name; tensors are not copied."""
    return {
        layer.name: {
            "started": layer.started,
            "warm_batches": layer.warm_batches,
            "tensors": dict(layer.kept),
        }
        for layer in layers
    }


def pack_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Param groups as torch saves them: hyperparameters, and parameters by running number."""
    packed, at = [], 0
    for group in groups:
        count = len(group["params"])
        options = {key: value for key, value in group.items() if key != "params"}
        packed.append({**options, "params": list(range(at, at + count))})
        at += count
    return packed


def check(saved: Any, own: dict, groups: int) -> Mapping[str, Any]:
    """The K-BFGS part of a state dict, if it fits this optimizer; else ValueError says why not."""
    if not isinstance(saved, Mapping) or "kbfgs" not in saved:
        raise ValueError("state_dict was not made by KBFGS or KBFGSL: it has no entry 'kbfgs'")
    part = saved["kbfgs"]
    for key, value in own.items():
        theirs = part["about"].get(key)
        if key == "layers" and theirs != value:
            raise ValueError(_layer_difference(theirs, value))
        if theirs != value:
            raise ValueError(
                f"state_dict has {key} = {theirs!r}, this optimizer has {key} = {value!r}"
            )
    if len(saved["param_groups"]) != groups:
        raise ValueError(
            f"state_dict has {len(saved['param_groups'])} param groups, this optimizer has {groups}"
        )
    return part


def _layer_difference(theirs: Mapping[str, list[int]], own: Mapping[str, list[int]]) -> str:
    for name in [*own, *theirs]:
        if theirs.get(name) != own.get(name):
            return (
                f"state_dict is of another model: layer '{name}' (n_g, n_a) is"
                f" {theirs.get(name)} there and {own.get(name)} here"
            )
    return "state_dict is of another model: its layers come in another order"


def load_layers(
    layers: list[LayerFactors], plan: Plan, saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Copy the saved tensors into the layers' own, which keep their place in memory."""
    for layer in layers:
        entry = saved[layer.name]
        if entry["tensors"]:
            layer.allocate(plan)
            for name, tensor in layer.kept.items():
                tensor.copy_(entry["tensors"][name])
        else:  # saved before the first step
            layer.clear()
        layer.started = entry["started"]
        layer.warm_batches = entry["warm_batches"]


def keep_devices(group: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Tensors of a loaded param group go where the group had its ``own``.

    A checkpoint read with map_location="cpu" would leave an lr there, which no graph can follow.
    """
    for name, value in group.items():
        if isinstance(value, torch.Tensor) and isinstance(own.get(name), torch.Tensor):
            group[name] = value.to(own[name].device)


def copy_into(own: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy each saved tensor into the own one of its name."""
    for name, tensor in own.items():
        tensor.copy_(saved[name])
