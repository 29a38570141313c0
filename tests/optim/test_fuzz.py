"""Fuzz of models and of call orders: training stays finite, or an error names what is wrong."""

import dataclasses
import math
import re
import warnings

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from kbfgs_ext import KBFGS, KBFGSL, DirectionRule, FactorRule
from tests.optim.models import four_calls

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "leaky in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "silu in place": lambda: nn.SiLU(inplace=True),
    "none": nn.Identity,
}
# What an error must name: an argument, a call, or what was wrong with the closure.
NAMED = (
    "loss|closure|first_pass|second_pass|descend|finish|batches|warm_start|state_dict|params|model"
    "|input of layer|gradient"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A network: widths and biases of its layers, one of which may be used twice."""

    widths: list[int]
    biases: list[bool]
    activations: list[str]
    reused: bool  # a square layer in the middle, applied twice
    normed: bool
    dtype: torch.dtype

    def build(self) -> nn.Sequential:
        modules: list[nn.Module] = []
        for i, (bias, name) in enumerate(zip(self.biases, self.activations, strict=True)):
            modules += [nn.Linear(*self.widths[i : i + 2], bias=bias), ACTIVATIONS[name]()]
        if self.reused:
            shared = nn.Linear(self.widths[-1], self.widths[-1])
            modules += [shared, nn.Tanh(), shared, nn.Tanh()]
        if self.normed:
            modules.append(nn.LayerNorm(self.widths[-1]))
        return nn.Sequential(*modules, nn.Linear(self.widths[-1], 3)).to(self.dtype)


@st.composite
def shapes(draw) -> Shape:
    depth = draw(st.integers(0, 3))  # the output layer comes on top
    return Shape(
        draw(st.lists(st.integers(1, 70), min_size=depth + 1, max_size=depth + 1)),
        draw(st.lists(st.booleans(), min_size=depth, max_size=depth)),
        draw(st.lists(st.sampled_from(list(ACTIVATIONS)), min_size=depth, max_size=depth)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    )


OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.3, 3.0, 100.0]),
        "damping": st.sampled_from([1e-6, 0.3, 10.0]),
        "hessian_action": st.sampled_from(["ema", "minibatch"]),
        "safeguard": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "pair_every": st.integers(1, 2),
        "max_grad_norm": st.sampled_from([None, 1.0]),
        "block_size": st.sampled_from([None, None, 1, 20]),
        "direction": st.builds(
            DirectionRule, step_length=st.sampled_from(["direction", "balanced", "layer"])
        ),
        "factors": st.builds(
            FactorRule,
            initial_scale=st.sampled_from([1.0, 1.0, "damping", 30.0]),
            restart_after=st.sampled_from([None, 1]),
            update_every=st.integers(1, 2),
        ),
    }
)
METHODS = st.sampled_from([(KBFGS, {}), (KBFGSL, {"memory": 1}), (KBFGSL, {"memory": 3})])


class Session:
    """A model, its optimizer, and everything that a caller may do, in any order."""

    def __init__(self, shape: Shape, method, options: dict) -> None:
        torch.manual_seed(0)
        self.shape, self.method, self.options = shape, method[0], {**options, **method[1]}
        self.poison = 1.0
        self.frozen: nn.Linear | None = None
        self.restart()

    def restart(self) -> None:
        self.model = self.shape.build()
        self.opt = self.method(self.model, **self.options)
        self.saved = None

    def batch(self, rows: int = 6) -> torch.Tensor:
        return (torch.randn(rows, self.shape.widths[0]) * self.poison).to(self.shape.dtype)

    def passes(self) -> torch.Tensor:
        self.opt.zero_grad()
        loss = self.model(self.x).float().square().mean()
        loss.backward()
        return loss

    # The calls. Each is an order that a training script could get into.

    def step(self) -> None:
        self.x = self.batch()
        self.opt.step(self.passes)

    def step_of_one_row(self) -> None:
        self.x = self.batch(1)
        self.opt.step(self.passes)

    def step_of_no_row(self) -> None:
        self.x = self.batch(0)
        self.opt.step(self.passes)

    def plain_loop(self) -> None:
        self.x = self.batch()
        four_calls(self.opt, self.passes)

    def first_pass_alone(self) -> None:
        self.x = self.batch()
        with self.opt.first_pass():
            self.loss = self.passes()

    def descend(self) -> None:
        self.opt.descend(getattr(self, "loss", torch.zeros(())))

    def second_pass_alone(self) -> None:
        self.x = self.batch()
        with self.opt.second_pass():
            self.loss = self.passes()

    def finish(self) -> None:
        self.opt.finish(getattr(self, "loss", torch.zeros(())))

    def step_in_a_pass(self) -> None:
        self.x = self.batch()
        with self.opt.first_pass():
            self.opt.step(self.passes)

    def step_without_closure(self) -> None:
        self.opt.step()

    def step_without_backward(self) -> None:
        self.opt.step(lambda: self.model(self.batch()).sum())

    def step_without_gradients(self) -> None:
        self.x = self.batch()
        with torch.no_grad():
            self.opt.step(self.passes)

    def nan_batch(self) -> None:
        self.poison, before = math.nan, self.poison
        try:
            self.step()
        finally:
            self.poison = before

    def larger_inputs(self) -> None:
        self.poison = min(self.poison * 1e3, 1e6)

    def save(self) -> None:
        model = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.saved = (model, self.opt.state_dict())

    def load(self) -> None:
        if self.saved is not None:
            self.model.load_state_dict(self.saved[0])
            self.opt.load_state_dict(self.saved[1])

    def load_nonsense(self) -> None:
        self.opt.load_state_dict({"state": {}, "param_groups": []})

    def zero_grad(self) -> None:
        self.opt.zero_grad(set_to_none=False)

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(self.batch())
        self.model.train()

    def evaluate_with_gradients(self) -> None:
        self.model(self.batch()).sum().backward()

    def warm_start(self) -> None:
        self.opt.warm_start([self.batch(), (self.batch(3),)])

    def add_known_group(self) -> None:
        self.opt.add_param_group({"params": list(self.model.parameters())})

    def freeze_last(self) -> None:
        """A new optimizer that does not know the last layer."""
        if len(self.shape.widths) > 1:
            self.frozen = self.model[-1].requires_grad_(False)
            self.opt = self.method(self.model, **self.options)

    def unfreeze(self) -> None:
        if self.frozen is not None:
            params = list(self.frozen.requires_grad_(True).parameters())
            self.frozen = None
            self.opt.add_param_group({"params": params, "lr": 0.1})

    def report(self) -> None:
        self.opt.diagnostics(), self.opt.counters(), self.opt.memory_usage()


CALLS = [
    name for name in vars(Session) if not name.startswith("_") and name not in
    ("restart", "batch", "passes")
]  # fmt: skip


def assert_finite(session: Session) -> None:
    for name, p in session.model.named_parameters():
        assert torch.isfinite(p).all(), name
    for layer in session.opt.layers:
        for name, tensor in layer.kept.items():
            assert torch.isfinite(tensor).all(), f"{layer.name} {name}"


FUZZ = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@FUZZ
@given(shapes(), METHODS, OPTIONS)
def test_any_model_trains(shape, method, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        session = Session(shape, method, options)
    for _ in range(4):
        session.step()
    assert_finite(session)
    assert int(session.opt.counters()["steps"]) == 4


@FUZZ
@given(shapes(), METHODS, OPTIONS, st.lists(st.sampled_from(CALLS), min_size=1, max_size=16))
def test_any_order_of_calls(shape, method, options, calls):
    """After every call all is finite; an error names what it is about, and a step works after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        session = Session(shape, method, options)
        for call in calls:
            try:
                getattr(session, call)()
            except (TypeError, ValueError, RuntimeError) as error:
                if not re.search(NAMED, str(error)):
                    raise
            assert_finite(session)
        session.poison = 1.0
        session.step()
    assert_finite(session)
