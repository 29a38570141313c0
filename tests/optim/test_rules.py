"""What the constructor takes by topic: the rules, their checks, and what they mean together."""

import dataclasses

import pytest

import kbfgs_ext
from kbfgs_ext import KBFGS, KBFGSL, DirectionRule, FactorRule, Precision, RankRule, presets
from kbfgs_ext.optim.hyper import MOVED
from tests.optim.models import mlp

PUBLISHED = {
    "direction": "newton", "step_length": "direction", "nesterov": False, "initial_scale": 1.0,
    "relative_damping": False, "restart_after": None, "factor_every": 1,
    "freeze_second_pass": True, "matmul_precision": None, "master_weights": True,
    "hessian_action": "ema", "safeguard": False, "pair_every": 1, "memory": None,
    "backend": "auto", "max_grad_norm": None, "block_size": "auto",
}  # fmt: skip
TUNED = PUBLISHED | {
    "step_length": "balanced", "initial_scale": "damping", "restart_after": 10,
    "hessian_action": "minibatch", "safeguard": True,
}  # fmt: skip
DEFAULTS = PUBLISHED | {
    "direction": "spectral", "step_length": "layer", "nesterov": True, "relative_damping": True,
    "restart_after": 10, "hessian_action": "minibatch", "safeguard": True, "pair_every": 10,
}  # fmt: skip


@pytest.mark.parametrize("method", [KBFGS, KBFGSL])
@pytest.mark.parametrize("word", MOVED)
def test_a_keyword_that_is_a_field_now(method, word):
    """It is refused by name, and the error says what to write, which is taken."""
    argument, rule, field = MOVED[word]
    with pytest.raises(TypeError) as refused:
        method(mlp(4, 3), **{word: None})
    what = "a field" if word == field else field
    said = f"{word} is {what} of {rule} now: {argument}={rule}({field}=...)"
    assert str(refused.value) == said
    kind = getattr(kbfgs_ext, rule)
    method(mlp(4, 3), **{argument: kind(**{field: getattr(kind(), field)})})


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, DEFAULTS),
        (presets.PUBLISHED, PUBLISHED),
        (presets.TUNED, TUNED),
        ({"direction": "spectral"}, DEFAULTS),
        (
            {"direction": "newton"},
            DEFAULTS | {"direction": "newton", "step_length": "direction", "nesterov": False},
        ),
    ],
    ids=["defaults", "published", "tuned", "spectral", "newton"],
)
def test_what_it_comes_to(options, wanted):
    assert dataclasses.asdict(KBFGS(mlp(4, 3), **options).settings) == wanted


def test_a_kind_of_direction_has_its_own_length():
    """Where nothing else is said."""
    assert DirectionRule() == DirectionRule("spectral", step_length="layer", nesterov=True)
    assert DirectionRule("newton") == presets.PUBLISHED["direction"]
    assert DirectionRule("newton", step_length="balanced") == presets.TUNED["direction"]
    assert DirectionRule("newton", nesterov=True).step_length == "direction"


@pytest.mark.parametrize(
    ("rule", "field", "value", "error"),
    [
        (DirectionRule, "kind", "polar", "kind of direction must be one of .*got 'polar'"),
        (DirectionRule, "step_length", "unit", "step_length must be one of .*got 'unit'"),
        (DirectionRule, "nesterov", 1, "nesterov must be a bool, got 1"),
        (FactorRule, "initial_scale", 0.0, "initial_scale must be in .*got 0.0"),
        (FactorRule, "initial_scale", "unit", "initial_scale must be a number or .*got 'unit'"),
        (FactorRule, "relative_damping", "no", "relative_damping must be a bool, got 'no'"),
        (FactorRule, "restart_after", 0, "restart_after must be at least 1, got 0"),
        (FactorRule, "update_every", -1, "update_every must be at least 1, got -1"),
        (FactorRule, "update_every", 1.5, "update_every must be an int, got 1.5"),
        (FactorRule, "freeze_second_pass", None, "freeze_second_pass must be a bool, got None"),
        (Precision, "matmul", "tf32", "matmul must be None or one of .*got 'tf32'"),
        (Precision, "master_weights", 0, "master_weights must be a bool, got 0"),
        (RankRule, "mean_over", "columns", "mean_over must be one of .*got 'columns'"),
        (RankRule, "shared_work", "always", "shared_work must be one of .*got 'always'"),
    ],
)
def test_every_field_is_checked(rule, field, value, error):
    with pytest.raises((TypeError, ValueError), match=error):
        rule(**{field: value})


@pytest.mark.parametrize("rule", [DirectionRule, FactorRule, Precision, RankRule])
def test_rules_do_not_change(rule):
    made = rule()
    for field in dataclasses.fields(rule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)
    assert made == rule() and hash(made) == hash(rule())


@pytest.mark.parametrize("argument", ["direction", "factors", "precision", "ranks"])
def test_another_thing_than_a_rule(argument):
    with pytest.raises(TypeError, match=rf"^{argument} must be a .*, got 3$"):
        KBFGS(mlp(4, 3), **{argument: 3})
