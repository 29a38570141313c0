"""How a closure runs its model: torch.func, compiled, on nested, sparse or empty inputs, beside
other modules and with buffers of every kind."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.func import grad as grad_of

from kbfgs_ext import KBFGS
from tests.optim.loops import (
    assert_one_run,
    assert_trains_as,
    backward_of,
    train,
)
from tests.optim.models import METHODS, assert_same_weights, rows
from tests.optim.test_closures import BIAS, PLAIN, error_of, net, x_of

# ---------------------------------------------------------------------- torch.compile


@METHODS
@BIAS
@pytest.mark.parametrize("what", ["step", "model"])
def test_compiled(method, bias, what):
    torch._dynamo.reset()
    model, twin = net(bias), net(bias)
    opt, other = method(model), method(twin)
    run = torch.compile(model, backend="eager") if what == "model" else model
    step = torch.compile(opt.step, backend="eager") if what == "step" else opt.step

    def closure():
        opt.zero_grad()
        loss = error_of(run(x_of()))
        loss.backward()
        return loss

    for _ in range(3):
        step(closure)
    train(twin, other, PLAIN, 3)
    assert_one_run((model, opt), (twin, other))
    torch._dynamo.reset()


# ---------------------------------------------------------------------- torch.func


def derivative(m):
    x = x_of().requires_grad_()
    u = m(x).sum(1)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return u, du


def derivative_by_func(m):
    du, u = vmap(lambda row: grad_of(lambda t: (m(t).sum(),) * 2, has_aux=True)(row))(x_of())
    return u, du


def tangent(m):
    x, v = x_of().requires_grad_(), rows(12, 4, seed=3)
    u = m(x)
    w = torch.zeros_like(u, requires_grad=True)
    (dx,) = torch.autograd.grad(u, x, w, create_graph=True)
    return u, torch.autograd.grad(dx, w, v, create_graph=True)[0]


def tangent_by_func(m):
    return jvp(m, (x_of(),), (rows(12, 4, seed=3),))


def physics(u, du):
    return (du - 1).square().mean() + u.square().mean()


FUNC = {
    "functional_call": (
        lambda m: error_of(functional_call(m, dict(m.named_parameters()), (x_of(),))),
        lambda m: error_of(m(x_of())),
    ),
    "vmap": (lambda m: error_of(vmap(m)(x_of())), lambda m: error_of(m(x_of()))),
    "vmap, out_dims": (
        lambda m: error_of(vmap(m, in_dims=1, out_dims=1)(x_of().T).T),
        lambda m: error_of(m(x_of())),
    ),
    "grad": (lambda m: physics(*derivative_by_func(m)), lambda m: physics(*derivative(m))),
    "jvp": (lambda m: physics(*tangent_by_func(m)), lambda m: physics(*tangent(m))),
}


@METHODS
@BIAS
@pytest.mark.parametrize("how", list(FUNC))
def test_torch_func(method, bias, how):
    work, plainly = FUNC[how]
    assert_trains_as(net(bias), backward_of(work), backward_of(plainly), method)


# ---------------------------------------------------------------------- modules of torch's own


class Encoder(nn.Module):
    """Attention, whose projections are used by hand, between layers that are called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, tokens, pad):
        return self.head(self.encoder(self.tokens(tokens), src_key_padding_mask=pad)[:, 0])


@METHODS
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_in_eval_mode_with_padding(method):
    """Torch's inference path, which skips the layers' hooks, does not switch on in either pass: a
    run in eval mode is that in training mode, without dropout the same function."""
    tokens, pad = torch.arange(84).view(12, 7) % 9, torch.zeros(12, 7, dtype=torch.bool)
    pad[:4, 5:] = True
    runs = []
    for training in (True, False):
        model = Encoder().double().train(training)
        opt = method(model, fallback=lambda ps: torch.optim.AdamW(ps, lr=1e-3))
        train(model, opt, backward_of(lambda m: error_of(m(tokens, pad))))
        assert all(int(d["accepted"]) for d in opt.diagnostics().values())
        runs.append((model, opt))
    assert_one_run(*runs)


# ---------------------------------------------------------------------- layouts


@METHODS
@BIAS
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs_are_their_rows(method, bias, layout):
    def nested(m):
        x = torch.nested.nested_tensor(list(x_of().split([5, 3, 4])), layout=layout)
        h = m[0](x)
        return torch.cat([m[2](torch.tanh(part)) for part in h.unbind()])

    assert_trains_as(net(bias), backward_of(lambda m: error_of(nested(m))), PLAIN, method)


@METHODS
@BIAS
def test_sparse_inputs_are_their_dense_ones(method, bias):
    x = x_of() * (rows(12, 4, seed=9) > 0)
    assert_trains_as(
        net(bias),
        backward_of(lambda m: error_of(m(x.to_sparse()))),
        backward_of(lambda m: error_of(m(x))),
        method,
    )


@METHODS
@BIAS
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_use_without_rows_is_no_use(method, bias, when):
    none = torch.zeros(12, dtype=torch.bool)

    def with_empty(m):
        extra = m(x_of()[none]).sum() if when == "before" else 0.0
        out = m(x_of())
        return error_of(out) + (m(x_of()[none]).sum() if when == "after" else extra)

    assert_trains_as(net(bias), backward_of(with_empty), PLAIN, method)


@METHODS
def test_an_expert_without_rows_stands_still(method):
    """The step is that of the others; a batch empty everywhere is refused with its shape."""
    torch.manual_seed(0)
    model = nn.ModuleList([net(), net()])
    twin = copy.deepcopy(model)
    none = torch.zeros(12, dtype=torch.bool)
    opt, other = method(model), method(twin)
    routed = backward_of(lambda m: error_of(m[0](x_of())) + m[1](x_of()[none]).sum())
    train(model, opt, routed)
    train(twin, other, backward_of(lambda m: error_of(m[0](x_of()))))
    assert_one_run((model, opt), (twin, other))
    with pytest.raises(ValueError, match=r"input of layer '0.0' is empty: shape \(0, 4\)"):
        train(model, opt, backward_of(lambda m: sum(part(x_of()[none]).sum() for part in m)), 1)
    assert_same_weights(model, twin)
    train(model, opt, backward_of(lambda m: error_of(m[1](x_of()))), 1)


# ---------------------------------------------------------------------- what lies outside, buffers


@METHODS
@pytest.mark.parametrize("given", ["module", "list"])
def test_outside_modules_and_generators_see_one_pass(method, given):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()).double()
    head = nn.Sequential(nn.Linear(6, 3)).double()
    once, generator = copy.deepcopy((body, head)), torch.Generator().manual_seed(5)
    drawn = []

    def loss_of(b, h, g):
        noise = torch.rand(12, 6, generator=g, dtype=torch.float64)
        drawn.append(noise)
        return error_of(h(b(x_of()) * noise))

    own = torch.Generator().manual_seed(5)
    loss_of(*once, own).backward()
    opt = method(head, context=body if given == "module" else [*body], generators=[generator])
    train(head, opt, backward_of(lambda h: loss_of(body, h, generator)), 1)
    assert torch.equal(drawn[1], drawn[0]) and torch.equal(drawn[2], drawn[0])
    assert torch.equal(generator.get_state(), own.get_state())
    assert int(body[1].num_batches_tracked) == 1
    for p, q in zip(body.buffers(), once[0].buffers(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(body.parameters(), once[0].parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad) and p.requires_grad


class Buffered(nn.Module):
    """Buffers of every kind; the large ones are above the size that is always copied."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 3).double(), nn.BatchNorm1d(3, affine=False).double()
        with torch.inference_mode():
            inference = torch.zeros(4)
        self.register_buffer("expanded", torch.ones(1, 4).expand(16, 4))
        self.register_buffer("inference", inference)
        self.register_buffer("nothing", None)
        self.register_buffer("replaced", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("grown", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("mask", torch.ones(70000, dtype=torch.float64))
        self.register_buffer("queue", torch.zeros(70001, dtype=torch.float64))

    def forward(self, x):
        out = self.norm(self.linear(x))
        self.replaced = 0.9 * self.replaced + out.detach().mean(0)
        self.grown = torch.cat([self.grown, out.detach().sum()[None]])
        self.queue[:3] += out.detach().square().mean(0)
        return out + self.mask[0] + self.queue[:3].clone()


def test_buffers_of_every_kind_see_one_pass():
    model, clones = Buffered(), []
    opt = KBFGS(model)
    pointer = model.mask.data_ptr()
    for _ in range(3):
        twin = copy.deepcopy(model)
        twin(x_of())
        train(model, opt, PLAIN, 1)
        clones.append([t.data_ptr() for t in opt.steps.buffers.copies()])
        assert model.nothing is None and model.mask.data_ptr() == pointer
        for (name, b), (_, other) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
            assert torch.equal(b, other), name
    assert int(model.norm.num_batches_tracked) == 3
    assert not any(t.numel() == 70000 for t in opt.steps.buffers.copies())
    assert sum(t.numel() == 70001 for t in opt.steps.buffers.copies()) == 1
    small = sum(
        b.numel() * b.element_size()
        for name, b in model.named_buffers()
        if name not in ("mask", "queue", "expanded", "inference")
    )
    assert opt.memory_usage()["buffers"] == small + 70001 * 8
