"""Kinds of layers: transformers' Conv1D, a user's own, and what is not covered, by name."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kbfgs_ext
from kbfgs_ext import KBFGS
from kbfgs_ext.optim import inputs, layers
from tests.optim.loops import TIGHT
from tests.optim.models import BALANCED, METHODS, assert_same, closure_of, mlp, rows, snapshot

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])


class Conv1D(nn.Module):
    """What transformers calls so: a Linear with a weight d_in x d_out."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(nx, nf, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(nf, dtype=torch.float64))

    def forward(self, x):
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view(*x.shape[:-1], -1)


@METHODS
@ACTIONS
@pytest.mark.parametrize("options", [{}, {"direction": BALANCED}, {"weight_decay": 0.1}])
def test_conv1d_is_a_transposed_linear(method, action, options):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(3, 7), nn.Linear(3, 2).double())
    twin = mlp(5, 7, 3)
    twin = nn.Sequential(twin[0], nn.Tanh(), twin[2], copy.deepcopy(model[3]))
    with torch.no_grad():
        for at in (0, 2):
            twin[at].weight.copy_(model[at].weight.T)
            twin[at].bias.copy_(model[at].bias)
    opts = [method(m, lr=0.1, hessian_action=action, **options) for m in (model, twin)]
    x, target = rows(12, 5).view(3, 4, 5), rows(12, 2, seed=1).view(3, 4, 2)
    for _ in range(12):
        for m, opt in zip((model, twin), opts, strict=True):
            opt.step(closure_of(m, opt, x, target))
    before, after = (snapshot(m, opt) for m, opt in zip((model, twin), opts, strict=True))
    for name, tensor in before.items():
        transposed = name in ("param 0.weight", "param 2.weight")
        torch.testing.assert_close(tensor.T if transposed else tensor, after[name], **TIGHT)


@METHODS
def test_conv1d_frozen_halves_and_checkpoints(method):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(3, 7))
        opt = method(model, lr=0.1)
        return model, opt, closure_of(model, opt, rows(12, 5), rows(12, 3, seed=1))

    model, opt, closure = build()
    for _ in range(2):
        opt.step(closure)
    other, resumed, again = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m in (model, other):
        m[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    for _ in range(2):
        opt.step(closure)
        resumed.step(again)
    assert torch.equal(model[0].weight, before)
    assert_same(snapshot(model, opt), snapshot(other, resumed))


def test_a_kind_of_ones_own():
    """A library's subclass of Linear, and a module that is known by its name."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    class Strange(nn.Module):  # without a bias, and known by its name
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3))

        def forward(self, values):
            return values @ self.kernel

    known = list(layers.KINDS)
    model = nn.Sequential(Scaled(5, 4), nn.Tanh(), Strange())
    try:
        with pytest.raises(ValueError, match="no layer to cover"):
            KBFGS(model)

        @kbfgs_ext.register_kind
        class OfScaled(kbfgs_ext.Kind):
            module_type = Scaled

        @kbfgs_ext.register_kind
        class OfStrange(kbfgs_ext.Kind):
            module_type = "Strange"

            @classmethod
            def views(cls, module):
                return [kbfgs_ext.View(module.kernel, None, outputs_first=torch.t)]

        opt = KBFGS(model, lr=0.1)
        assert [(x.name, x.n_g, x.n_a) for x in opt.layers] == [("0", 4, 6), ("2", 3, 4)]
        closure = closure_of(model, opt, rows(8, 5, torch.float32), torch.ones(8, 3))
        losses = [opt.step(closure).item() for _ in range(5)]
        assert losses[-1] < losses[0]
        with pytest.raises(TypeError, match="kind must be a subclass of kbfgs_ext.Kind"):
            kbfgs_ext.register_kind(Scaled)
        with pytest.raises(TypeError, match="Bad.module_type must be a type of module, got 3"):
            kbfgs_ext.register_kind(type("Bad", (kbfgs_ext.Kind,), {"module_type": 3}))
    finally:
        layers.KINDS[:] = known


class Own(nn.Conv2d):
    """A subclass, which may compute anything."""


class OwnLinear(nn.Linear):
    """Another."""


def test_what_is_not_covered_and_why():
    model = nn.Sequential(nn.LayerNorm(4), Own(4, 4, 1), OwnLinear(4, 4), nn.Conv2d(4, 4, 1))
    with pytest.warns(UserWarning, match="KBFGS covers 1 layer") as said:
        opt = KBFGS(model)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and not again
        opt.step(closure_of(model, opt, torch.randn(4, 4, 4, 4), torch.zeros(4, 4, 4, 4)))
    reasons = {row.name: row.reason for row in opt.coverage() if not row.covered}
    for at, reason in enumerate((
        "LayerNorm is no kind of layer that is covered",
        "Own is a subclass of Conv2d: register_kind covers it",
        "OwnLinear is a subclass of Linear: register_kind covers it",
    )):  # fmt: skip
        assert reasons[f"{at}.weight"] == reasons[f"{at}.bias"] == reason
    assert [layer.name for layer in opt.layers] == ["3"]


def test_what_the_constructor_says_is_short():
    """Shares by reason, the largest first, and a few names."""
    norms = [nn.LayerNorm(8) for _ in range(100)]
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(300, 8), *norms)
    with pytest.warns(UserWarning, match="KBFGS covers 1 layer, 1.8% of the trained") as seen:
        KBFGS(model)
    said = str(seen[0].message)
    assert "1.weight (58.9%: Embedding is no kind" in said
    assert "2.weight, 2.bias, 3.weight and 197 more (39.3%: LayerNorm is no kind" in said
    assert said.index("Embedding") < said.index("LayerNorm") and len(said) < 400


def test_complex_weights_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1, dtype=torch.complex64))
    with pytest.raises(TypeError, match="weight of layer '1' is torch.complex64"):
        KBFGS(model)


class Largest(TorchDispatchMode):
    """The largest storage that an op has returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@METHODS
@ACTIONS
def test_no_step_forms_the_patches(method, action, monkeypatch):
    """Nothing is larger than the padded input; the start and "ema" take patches in blocks."""
    monkeypatch.setattr(inputs, "BLOCK", 2**12)
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 4, 5, padding=2, stride=2)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, target = torch.randn(32, 8, 12, 12), torch.randn(32, 3)
    opt = method(model, hessian_action=action, block_size=1000)
    closure = closure_of(model, opt, x, target)
    padded = 4 * 32 * 8 * 16 * 16
    assert padded < 4 * (32 * 36) * (8 * 25) / 3  # the patches
    for _ in range(3):
        with Largest() as seen:
            opt.step(closure)
        assert seen.bytes <= max(padded, 4 * 201 * 201 * 2)


@pytest.mark.parametrize("limit", [1, 7, 100, 2**20])
def test_blocks_are_all_patches_once(limit, monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK", limit)
    x = torch.randn(3, 2, 5, 4)
    window = layers.Convolution.views(nn.Conv2d(2, 1, (2, 3), padding=1, stride=(1, 2)))[0].inputs
    patches = window(x)
    blocks = list(patches.blocks())
    whole = F.unfold(x, (2, 3), padding=1, stride=(1, 2)).mT.flatten(0, 1)
    torch.testing.assert_close(torch.cat(blocks), whole, rtol=0, atol=0)
    assert patches.m == len(whole)
    assert all(b.numel() <= limit or len(b) <= 1 for b in blocks)


@METHODS
@ACTIONS
def test_no_host_read(method, action):
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = nn.Conv2d(2, 4, 3)
        last = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        conv.weight = nn.Parameter(last)
        deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        model = nn.Sequential(conv, nn.ReLU(), deep, nn.Flatten(), nn.Linear(16, 3))
        opt = method(model, hessian_action=action)
        closure = closure_of(model, opt, torch.randn(8, 2, 4, 4), torch.randn(8, 3))
        for _ in range(3):
            opt.step(closure)


@pytest.mark.parametrize("allowed", [True, False])
def test_convolutions_are_exact_and_leave_torch_s_settings(allowed):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = allowed
        setting = cudnn.conv.fp32_precision
        with inputs.exact_convolutions():
            assert cudnn.conv.fp32_precision == "ieee"
        assert cudnn.conv.fp32_precision == setting
        assert cudnn.allow_tf32 == allowed
    finally:
        cudnn.allow_tf32 = before


def test_a_hook_that_goes_in_the_middle_of_a_call():
    """Garbage collection may take an optimizer between two hooks of a layer under way."""
    model = mlp(4, 3)
    opt = KBFGS(model)
    model[0].register_forward_hook(lambda *_: opt.close(), prepend=True)
    assert model(rows(2, 4)).shape == (2, 3)
    assert opt.closed
