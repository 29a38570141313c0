"""The fallback: void and undone steps bit for bit, as many ops for many tensors as for few."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step.counts import OpCounter
from kbfgs_ext import KBFGS
from kbfgs_ext.optim.copies import Copies
from kbfgs_ext.optim.fallback import Fallback, default_fallback


class Own(torch.optim.Optimizer):
    """A user's, with state of its own: gradients' signs, and how often each has moved."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["moved"] = state.get("moved", torch.zeros(3, dtype=torch.int64))
            state["moved"].add_(1)
            state["last"] = state.get("last", torch.zeros_like(p))
            state["last"].copy_(p.grad)
            p.sub_(0.1 * p.grad.sign())


FACTORIES = {
    "default": default_fallback,
    "AdamW": torch.optim.AdamW,
    "AdamW, foreach": lambda ps: torch.optim.AdamW(ps, foreach=True),
    "AdamW, amsgrad": lambda ps: torch.optim.AdamW(ps, fused=True, amsgrad=True),
    "Adam, fused": lambda ps: torch.optim.Adam(ps, fused=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD, fused": lambda ps: torch.optim.SGD(ps, lr=0.1, fused=True),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "momentum, fused": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "Own": Own,
}
EVERY = pytest.mark.parametrize("factory", FACTORIES.values(), ids=list(FACTORIES))
FALSE, TRUE = torch.tensor(False), torch.tensor(True)
LIKE = torch.zeros((), dtype=torch.float64)


def made(factory, count=4, dtype=torch.float32, seed=0):
    """A fallback of ``count`` parameters with gradients."""
    torch.manual_seed(seed)
    named = {f"p{i}": nn.Parameter(torch.randn(3 + i, 2).to(dtype)) for i in range(count)}
    fallback = Fallback(named, factory)
    gradients(fallback)
    return fallback


def gradients(fallback, value=None):
    for p in fallback.parameters():
        p.grad = torch.randn(p.shape).to(p.dtype)
        if value is not None:
            p.grad.view(-1)[0] = value


def values(fallback):
    state = fallback.optimizer.state
    kept = [v for p in fallback.parameters() for v in state.get(p, {}).values()]
    return [t.detach().clone() for t in [*fallback.parameters(), *kept] if torch.is_tensor(t)]


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@EVERY
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_void_step_leaves_everything(factory, value):
    fallback = made(factory)
    fallback.step(TRUE)
    gradients(fallback)
    fallback.step(TRUE)
    before = values(fallback)
    gradients(fallback, value)
    fallback.step(FALSE)
    assert_equal(values(fallback), before)


@EVERY
def test_a_void_first_step_leaves_no_trace_but_a_count(factory):
    """The state that it makes is that of a gradient of zero."""
    fallback = made(factory)
    before = [p.detach().clone() for p in fallback.parameters()]
    gradients(fallback, torch.nan)
    fallback.step(FALSE)
    assert_equal(fallback.parameters(), before)
    for p in fallback.parameters():
        for name, value in fallback.optimizer.state.get(p, {}).items():
            counts = name in ("step", "moved")
            assert value is None or bool((value == (1 if counts else 0)).all())
    gradients(fallback)
    fallback.step(TRUE)
    assert all(t.isfinite().all() for t in values(fallback))


@EVERY
def test_a_sound_step_is_the_optimizer_s_own(factory):
    fallback, alone = made(factory), made(factory).optimizer
    for seed in range(3):
        torch.manual_seed(seed)
        gradients(fallback)
        for p, q in zip(fallback.parameters(), alone.param_groups[0]["params"], strict=True):
            q.grad = p.grad.clone()
        fallback.step(TRUE)
        alone.step()
    mine, its = (list(o.state.values()) for o in (fallback.optimizer, alone))
    assert_equal(fallback.parameters(), alone.param_groups[0]["params"])
    for a, b in zip(mine, its, strict=True):
        assert str(a) == str(b)


@EVERY
def test_undone_where_asked(factory):
    fallback = made(factory)
    fallback.step(TRUE)
    before = [p.detach().clone() for p in fallback.parameters()]
    gradients(fallback)
    fallback.step(TRUE)
    stepped = values(fallback)
    fallback.undo(FALSE)
    assert_equal(values(fallback), stepped)
    fallback.undo(TRUE)
    assert_equal(fallback.parameters(), before)
    assert_equal(values(fallback)[len(before) :], stepped[len(before) :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slope(dtype):
    fallback = made(lambda ps: torch.optim.SGD(ps, lr=0.25), dtype=dtype)
    before = [p.detach().clone() for p in fallback.parameters()]
    fallback.step(TRUE)
    found = fallback.slope(LIKE)
    expected = sum(
        (p.grad * (p.detach() - q)).double().sum()
        for p, q in zip(fallback.parameters(), before, strict=True)
    )
    assert found.dtype == torch.float64
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_slope_with_a_sparse_gradient_and_one_that_is_gone():
    rows = nn.Embedding(5, 3, sparse=True)
    others = [nn.Parameter(torch.randn(4)) for _ in range(2)]
    named = {"rows": rows.weight, "p": others[0], "q": others[1]}
    fallback = Fallback(named, lambda ps: torch.optim.SGD(ps, lr=0.5))
    (rows(torch.tensor([1, 3, 3])).square().sum() + others[0].sum() + others[1].sum()).backward()
    squared = sum(float(g.to_dense().square().sum()) for g in (rows.weight.grad, others[0].grad))
    fallback.step(TRUE)
    others[1].grad = None
    found = fallback.slope(LIKE)
    assert found == pytest.approx(-0.5 * squared, rel=1e-6)


KINDS = [
    torch.tensor([1.0, torch.nan, -torch.inf, -0.0]),
    torch.tensor([0.1, -0.0], dtype=torch.float64),
    torch.tensor([1.0, torch.nan], dtype=torch.bfloat16),
    torch.tensor([1 + 2j, complex(torch.inf, -0.0)]),
    torch.tensor([1 + 2j], dtype=torch.complex128),
    torch.tensor([2**62, -(2**63)]),
    torch.tensor([True, False]),
    torch.tensor(3.0),
    torch.arange(6.0).view(2, 3).T,  # lies otherwise in memory
    torch.arange(48.0).view(1, 3, 4, 4).to(memory_format=torch.channels_last),
    torch.empty(0),
]


def bits(t):
    return (
        t.clone(memory_format=torch.contiguous_format).numpy(force=True).tobytes()
        if (t.dtype != torch.bfloat16)
        else bits(t.view(torch.int16))
    )


@pytest.mark.parametrize("where", [True, False])
def test_copies_of_every_kind_come_back_to_the_bit(where):
    tensors = [t.clone() for t in KINDS]
    copies = Copies()
    copies.keep(tensors)
    before = [bits(t) for t in tensors]
    for t in tensors:
        t.copy_(torch.randn(t.shape) * 3)
    wanted = before if where else [bits(t) for t in tensors]
    copies.put_back(torch.tensor(where))
    assert [bits(t) for t in tensors] == wanted


def test_copies_keep_their_places():
    tensors = [torch.randn(3), torch.randn(2, 2)]
    copies = Copies()
    copies.keep(tensors)
    held = [t.data_ptr() for t in copies.tensors()]
    copies.keep([t.clone() for t in tensors])
    assert [t.data_ptr() for t in copies.tensors()] == held
    copies.keep(tensors[:1])
    assert [t.data_ptr() for t in copies.tensors()] != held


CALLS = {
    "step": lambda fallback: fallback.step(TRUE),
    "slope": lambda fallback: fallback.slope(LIKE),
    "undo": lambda fallback: fallback.undo(FALSE),
}
OPS = {  # those of AdamW are torch's own five or so, more where its step counts are on the host
    "default": {"step": 7, "slope": 4, "undo": 5},
    "momentum, fused": {"step": 5, "slope": 4, "undo": 5},
}


@pytest.mark.parametrize("name", OPS)
def test_ops_do_not_grow_with_the_tensors(name):
    """On a GPU each is a launch, or one for every hundred or so tensors."""
    for count in (4, 48):
        fallback, found = made(FACTORIES[name], count), {}
        for _ in range(3):
            gradients(fallback)
            for call, act in CALLS.items():
                with torch.no_grad(), OpCounter() as ops:
                    act(fallback)
                found[call] = ops.count
        assert found == OPS[name], count


def test_ops_of_an_optimizer_that_knows_no_void_steps():
    found = []
    for count in (4, 48):
        fallback = made(lambda ps: torch.optim.SGD(ps, momentum=0.9, foreach=True), count)
        fallback.step(TRUE)
        with torch.no_grad(), OpCounter() as ops:
            fallback.step(TRUE)
        found.append(ops.count)
    assert found[0] == found[1] <= 20


@pytest.mark.parametrize("name", ["default", "AdamW, foreach", "momentum, fused"])
def test_no_host_read(name):
    """A fake tensor has no value."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        opt = KBFGS(model, fallback=FACTORIES[name])
        for _ in range(3):
            opt.zero_grad()

            def closure():
                opt.zero_grad()
                loss = model(torch.randn(8, 5)).square().mean()
                loss.backward()
                return loss

            opt.step(closure)
