"""State in torch's own form, for the tools that look there, and what an optimizer reports."""

import json
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from kbfgs_ext import KBFGS
from tests.optim.loops import backward_of, everything, train
from tests.optim.models import METHODS, assert_same, mlp, newton, rows

FALLBACKS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
    None: None,
}


def build(method, fallback="AdamW", action="minibatch", **options):
    torch.manual_seed(1)
    norm = [nn.LayerNorm(6)] if fallback else []
    layers = nn.Linear(4, 6), *norm, nn.Tanh(), nn.Linear(6, 3, bias=False)
    model = nn.Sequential(*layers).double()
    fallback = FALLBACKS[fallback]
    return model, method(model, hessian_action=action, fallback=fallback, lr=0.5, **options)


def run(model, opt, steps):
    for k in steps:
        x, target = rows(12, 4, seed=k), rows(12, 3, seed=100 + k)
        train(model, opt, backward_of(lambda m, x=x, t=target: (m(x) - t).square().mean()), 1)


# ---------------------------------------------------------------------- ways to save


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def by_state_dict_tools(model, opt, other_model, other, folder, options=None):
    other_model.load_state_dict(model.state_dict())
    state = get_optimizer_state_dict(model, opt, options=options)
    set_optimizer_state_dict(other_model, other, state, options=options)


def by_flat_tools(*given):
    by_state_dict_tools(*given, FLAT)


def by_dcp(model, opt, other_model, other, folder, options=None):
    def state_of(m, o):
        return {"model": m.state_dict(), "opt": get_optimizer_state_dict(m, o, options=options)}

    saved, template = state_of(model, opt), state_of(other_model, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.save(saved, checkpoint_id=folder)
        dcp.load(template, checkpoint_id=folder)
    other_model.load_state_dict(template["model"])
    set_optimizer_state_dict(other_model, other, template["opt"], options=options)


def by_flat_dcp(*given):
    by_dcp(*given, FLAT)


def tensors_and_json(model, opt, other_model, other, folder):
    """As safetensors would have it: tensors in one flat dict, the rest text."""
    state = opt.state_dict()
    flat, rest = {}, {}
    for i, entry in state["state"].items():
        for name, value in entry.items():
            (flat if isinstance(value, torch.Tensor) else rest)[f"{i}/{name}"] = value
    flat = {name: t.detach().clone().contiguous() for name, t in flat.items()}
    text = json.dumps({"groups": state["param_groups"], "rest": rest})
    read = json.loads(text)
    loaded = {"state": {}, "param_groups": read["groups"]}
    for name, value in {**flat, **read["rest"]}.items():
        i, key = name.split("/")
        loaded["state"].setdefault(int(i), {})[key] = value
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(loaded)


WAYS = [(by_state_dict_tools, 2), (by_dcp, 0), (by_dcp, 2), (tensors_and_json, 2)]
WAYS += [(by_flat_tools, 2), (by_flat_dcp, 0), (by_flat_dcp, 2)]


@METHODS
@pytest.mark.parametrize(("way", "stepped"), WAYS)
@pytest.mark.parametrize("fallback", list(FALLBACKS), ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(method, way, fallback, stepped, tmp_path):
    model, opt = build(method, fallback, action="ema" if stepped else "minibatch")
    run(model, opt, range(stepped))
    other_model, other = build(method, fallback, action="ema" if stepped else "minibatch")
    run(other_model, other, range(7, 8))  # what is loaded replaces what was there
    if way in (by_dcp, by_flat_dcp):
        other_model, other = build(method, fallback, action="ema" if stepped else "minibatch")
    way(model, opt, other_model, other, tmp_path)
    for m, o in ((model, opt), (other_model, other)):
        run(m, o, range(2, 5))
    assert_same(everything(model, opt), everything(other_model, other))


def test_flat_state_of_several_groups():
    """Each parameter has the options of its group; torch's tools put the groups together again."""
    runs = []
    for lr in (0.1, 0.4):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
        groups = [{"params": model[2], "lr": lr, "damping": torch.tensor(lr)}]
        runs.append((model, KBFGS(model, groups=groups, fallback=torch.optim.AdamW)))
        run(*runs[-1], range(2))
    (model, opt), (twin, other) = runs
    by_flat_tools(model, opt, twin, other, None)
    assert [group["lr"] for group in other.param_groups] == [0.05, 0.1, 0.001]
    for m, o in runs:
        run(m, o, range(2, 5))
    assert_same(everything(model, opt), everything(twin, other))


def test_the_live_state_is_what_a_checkpoint_has():
    model, opt = build(KBFGS)
    run(model, opt, range(2))
    saved, parameters = opt.state_dict(), [p for g in opt.param_groups for p in g["params"]]
    assert [*opt.state] == [parameters[i] for i in saved["state"]]
    for i, entry in saved["state"].items():
        live = opt.state[parameters[i]]
        assert live.keys() == entry.keys()
        assert all(torch.equal(live[name], value) for name, value in entry.items())
    assert opt.state[model[0].weight]["H_a"] is opt.layers[0]["H_a"]
    assert opt.state[torch.zeros(1)] == {}


def test_a_checkpoint_of_the_old_format_is_refused_by_name():
    _, opt = build(KBFGS)
    old = {"kbfgs": {"about": {"format": 4}}, "state": {}, "param_groups": []}
    with pytest.raises(
        ValueError, match=r"format 4, of an older version of kbfgs_ext; this one reads format 6"
    ):
        opt.load_state_dict(old)
    with pytest.raises(ValueError, match="was not made by KBFGS or KBFGSL"):
        opt.load_state_dict(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0).state_dict())


# ---------------------------------------------------------------------- reports


def test_explain_names_every_op_that_is_on_the_reference(monkeypatch):
    model, opt = build(newton, None, backend="reference")
    run(model, opt, range(2))
    first, *rest = opt.explain().splitlines()
    ops = {line.split("/")[1].split(":")[0] for line in rest}
    named = set(first.split("on the reference: ")[1].split(", "))
    assert named == ops >= {"kron_step_", "factor_ema_", "curvature_update_", "output_change_"}
    monkeypatch.setenv("KBFGS_BACKEND", "reference")
    model, opt = build(newton, None)
    assert "KBFGS_BACKEND=reference" in opt.explain()
    run(model, opt, range(2))
    assert opt.explain().splitlines()[0] == first


def test_coverage_tells_every_parameter():
    _, opt = build(KBFGS, exclude="3")
    found = {row.name: (row.covered, row.parameters, row.reason) for row in opt.coverage()}
    assert found == {
        "0": (True, 30, ""),
        "1.weight": (False, 6, "LayerNorm is no kind of layer that is covered"),
        "1.bias": (False, 6, "LayerNorm is no kind of layer that is covered"),
        "3.weight": (False, 18, "excluded"),
    }
    assert opt.coverage().share == 30 / 60
    assert "fallback: excluded" in str(opt.coverage())


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        ("head", ValueError, "no layer of the model has a name like 'head'"),
        (["0", "x.*"], ValueError, "has a name like 'x"),
        (nn.Linear(2, 2), ValueError, "a Linear is no part of the model"),
        ([3], TypeError, "exclude must hold modules and names, got 3"),
        (["0", "2"], ValueError, "no layer to cover.*that is not excluded"),
    ],
)
def test_what_cannot_be_excluded(exclude, error, message):
    model = mlp(4, 5, 3)
    with pytest.raises(error, match=message):
        KBFGS(model, exclude=exclude)
    assert not any(module._forward_hooks for module in model.modules())
