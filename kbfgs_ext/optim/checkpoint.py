"""Checkpoints in torch's own form, checked as a whole before anything is loaded.

    {"state":        {number of a parameter: {name: tensor}},
     "param_groups": [{"lr": ..., "params": [numbers]}, ...]}

A layer's tensors are its weight's, those of the whole optimizer the first weight's, under
"safeguard_...". Every covered parameter has "progress", (started, warm_batches). What is neither a
tensor nor a hyperparameter stands in the first group, under "kbfgs": plain numbers and names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.settings import Settings

FORMAT = 6
GLOBAL = "safeguard_"
ABOUT = "kbfgs"


@dataclasses.dataclass
class Saved:
    """A checked state dict: the entries of each parameter by its place in the own groups."""

    state: list[Mapping[str, torch.Tensor]]  # of the covered parameters
    groups: list[dict[str, Any]]
    iteration: int
    fallback: dict[str, Any]
    share: list[int] | None  # rank and number of ranks, if A is that rank's own


def describe(settings: Settings, layers: list[CoveredLayer]) -> dict[str, Any]:
    """What a checkpoint must agree on with the optimizer that loads it."""
    sizes = {
        layer.name: [layer.n_g, layer.n_a] + [layer.groups] * (layer.groups > 1) for layer in layers
    }
    blocks = {
        layer.name: [[f.n for f in side] for side in (layer.gradients, layer.activations)]
        for layer in layers
        if not layer.whole
    }
    return {"format": FORMAT, **settings.about(), "layers": sizes, "blocks": blocks}


def pack(
    groups: list[dict[str, Any]],
    layers: list[CoveredLayer],
    whole: Mapping[str, torch.Tensor],
    fallback: Mapping[str, Any] | None,
    about: dict[str, Any],
) -> dict[str, Any]:
    """The state dict. ``whole`` are the tensors of the optimizer as such, ``fallback`` the state
    dict of the fallback, whose groups come last."""
    packed, at = [], 0
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        packed.append({**options, "params": list(range(at, at + len(group["params"])))})
        at += len(group["params"])
    entries: dict[int, dict[str, Any]] = {}  # by the parameter, of which a layer may be a part
    for layer in layers:
        progress = torch.tensor([int(layer.started), layer.warm_batches], device="cpu")
        for p in layer.parameters():
            entries.setdefault(id(p), {"progress": progress.clone()})
        kept = {layer.prefix + name: tensor for name, tensor in layer.kept.items()}
        entries[id(layer.weight)] |= {**kept, layer.prefix + "progress": progress}
    state: dict[int, dict[str, Any]] = dict(enumerate(entries.values()))
    state[0] |= {GLOBAL + name: tensor for name, tensor in whole.items()}
    if fallback is not None:
        covered = len(state)
        state |= {covered + i: entry for i, entry in fallback["state"].items()}
        about = {**about, "fallback": _rest(fallback)}
    packed[0][ABOUT] = about
    return {"state": state, "param_groups": packed}


def _rest(fallback: Mapping[str, Any]) -> dict[str, Any]:
    """What a fallback keeps beside torch's two entries."""
    return {key: v for key, v in fallback.items() if key not in ("state", "param_groups")}


def check(saved: Any, own: dict, groups: list[dict[str, Any]]) -> Saved:
    """The parts of a state dict, if it fits this optimizer; else ValueError says why not."""
    if isinstance(saved, Mapping) and ABOUT in saved:
        raise ValueError(
            f"state_dict has format {saved[ABOUT]['about'].get('format')!r}, of an older version"
            f" of kbfgs_ext; this one reads format {FORMAT}"
        )
    theirs = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if not theirs or ABOUT not in theirs[0]:
        raise ValueError(
            "state_dict was not made by KBFGS or KBFGSL: its first param group has no entry"
            f" {ABOUT!r}"
        )
    about = _upgraded(theirs[0][ABOUT])
    for key, value in own.items():
        if key == "layers" and about.get(key) != value:
            raise ValueError(_layer_difference(about[key], value))
        if key == "blocks" and about.get(key) != value:
            raise ValueError(_block_difference(about[key], value))
        if about.get(key) != value:
            raise ValueError(
                f"state_dict has {key} = {about.get(key)!r}, this optimizer has {key} = {value!r}"
            )
    if len(theirs) != len(groups):
        raise ValueError(
            f"state_dict has {len(theirs)} param groups, this optimizer has {len(groups)}"
        )
    sizes = [len(group["params"]) for group in theirs], [len(g["params"]) for g in groups]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"state_dict has {sizes[0]} parameters in its groups, this optimizer {sizes[1]}"
        )
    covered = sum("powell" in group for group in groups)
    names = [name for group in theirs[:covered] for name in group["params"]]
    missing = [name for name in names if "progress" not in saved["state"].get(name, {})]
    if missing:
        raise ValueError(f"state_dict has no state of the covered parameters {missing}")
    others = [name for group in theirs[covered:] for name in group["params"]]
    entries = {i: saved["state"][n] for i, n in enumerate(others) if n in saved["state"]}
    options = [
        {key: value for key, value in group.items() if key not in ("params", ABOUT)}
        for group in theirs
    ]
    return Saved(
        [saved["state"][name] for name in names],
        options,
        about["iteration"],
        {
            "state": entries,
            "param_groups": _numbered(options[covered:], theirs[covered:]),
            **about.get("fallback", {}),
        },
        about.get("share"),
    )


def _upgraded(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint of the format before says in this one's words, where it can be loaded: its
    sides were one block, or had no factor where they were larger than its max_factor_dim."""
    if about.get("format") != FORMAT - 1:
        return about
    about = {**about, "format": FORMAT, "blocks": {}}
    largest = about.pop("max_factor_dim")
    for name, sides in about["layers"].items():
        ring = about["memory"] is not None
        if largest is not None and max(sides[ring:]) > largest:
            raise ValueError(
                f"state_dict is of format {FORMAT - 1}, where max_factor_dim = {largest} left"
                f" layer '{name}', (n_g, n_a) = {tuple(sides)}, without a factor that it has here:"
                " exclude= gives the layer to the fallback, or train on with the version that"
                " saved it"
            )
    return about


def _block_difference(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    name = next(name for name in [*own, *theirs] if theirs.get(name) != own.get(name))
    said = [
        "one block each" if blocks is None else f"blocks of {blocks[0]} and {blocks[1]}"
        for blocks in (theirs.get(name), own.get(name))
    ]
    return (
        f"state_dict has n_g and n_a of layer '{name}' in {said[0]}, this optimizer in {said[1]}:"
        " block_size= decides"
    )


def _numbered(options: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    numbered, at = [], 0
    for values, group in zip(options, groups, strict=True):
        numbered.append({**values, "params": list(range(at, at + len(group["params"])))})
        at += len(group["params"])
    return numbered


def _layer_difference(theirs: Mapping[str, list[int]], own: Mapping[str, list[int]]) -> str:
    for name in [*own, *theirs]:
        if theirs.get(name) != own.get(name):
            return (
                f"state_dict is of another model: layer '{name}' (n_g, n_a, groups) is"
                f" {theirs.get(name)} there and {own.get(name)} here"
            )
    return "state_dict is of another model: its layers come in another order"


def check_parts(layers: list[CoveredLayer], saved: Saved) -> None:
    """Raise ValueError where a layer's tensors are not all there: another rank has them."""
    parameters = {id(p): p for layer in layers for p in layer.parameters()}
    entries = dict(zip(parameters, saved.state, strict=True))
    for layer in layers:
        names = [layer.prefix + name for name in layer.kept_shapes() if "master_" not in name]
        missing = [name for name in names if name not in entries[id(layer.weight)]]
        if missing:
            raise ValueError(
                f"state_dict has no {missing[0]} of layer '{layer.name}': where ranks share the"
                " work each has a part of the state, and torch.distributed.checkpoint puts the"
                " parts together"
            )


def load(layers: list[CoveredLayer], whole: Mapping[str, torch.Tensor], saved: Saved) -> None:
    """Copy the saved tensors into the own ones, which keep their place in memory."""
    parameters = {id(p): p for layer in layers for p in layer.parameters()}
    entries = dict(zip(parameters, saved.state, strict=True))
    for layer in layers:
        entry = entries[id(layer.weight)]
        for name, tensor in layer.kept.items():
            known = layer.prefix + name
            if known in entry or not name.startswith("master_"):  # those follow the parameters
                tensor.copy_(entry[known])
        started, warm_batches = entry[layer.prefix + "progress"].tolist()
        layer.started, layer.warm_batches = bool(started), int(warm_batches)
    for name, tensor in whole.items():
        tensor.copy_(saved.state[0][GLOBAL + name])


def keep_devices(group: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Tensors of a loaded param group go where the group had its ``own``.

    A checkpoint read with map_location="cpu" would leave an lr there, which no graph can follow.
    """
    for name, value in group.items():
        if isinstance(value, torch.Tensor) and isinstance(own.get(name), torch.Tensor):
            group[name] = value.to(own[name].device)
