"""nn.MultiheadAttention is the same network written with Linear layers: whole trajectories."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kbfgs_ext import KBFGS, KBFGSL, presets
from tests.optim.loops import TIGHT
from tests.optim.models import DEFAULTS, assert_same, rows, snapshot
from tests.optim.test_blocks import DEFAULT

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
STEPS, E, HEADS = 12, 8, 2
LINEAR = F.linear


class ByLinear(nn.Module):
    """Attention, with a Linear for each of its matrices."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        bias = attention.in_proj_bias
        biases = [None] * 3 if bias is None else bias.detach().chunk(3)
        if attention.in_proj_weight is None:
            weights = [getattr(attention, f"{name}_proj_weight").detach() for name in "qkv"]
        else:
            weights = attention.in_proj_weight.detach().chunk(3)
        self.q, self.k, self.v = map(self.linear, weights, biases)
        out = attention.out_proj
        self.out = self.linear(out.weight.detach(), None if bias is None else out.bias.detach())

    @staticmethod
    def linear(W: torch.Tensor, b: torch.Tensor | None) -> nn.Linear:
        made = nn.Linear(W.shape[1], W.shape[0], b is not None, dtype=W.dtype)
        made.weight.data.copy_(W)
        if b is not None:
            made.bias.data.copy_(b)
        return made

    def forward(self, q, k, v):
        def heads(h):
            return h.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        # add_zero_attn: without that one key the loss does not depend on the bias of the others,
        # and what the gate of their pair decides on is rounding.
        k, v = (F.pad(h, (0, 0, 0, 1)) for h in (self.k(k), self.v(v)))
        h = F.scaled_dot_product_attention(heads(self.q(q)), heads(k), heads(v))
        return self.out(h.transpose(1, 2).flatten(2))


def attention(bias: bool = True, **options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(
        E, HEADS, bias=bias, batch_first=True, add_zero_attn=True, dtype=torch.float64, **options
    )
    if bias:
        nn.init.normal_(made.in_proj_bias)
    return made


def sequences(length: int, width: int = E, seed: int = 0) -> torch.Tensor:
    return rows(3 * length, width, seed=seed).view(3, length, width)


def closure_of(opt, forward, target):
    def closure():
        opt.zero_grad()
        loss = 3 * (forward() - target).square().mean()
        loss.backward()
        return loss

    return closure


q, second, third = sequences(4), sequences(5, seed=1), sequences(5, seed=2)
TARGET = sequences(4, seed=3)
CASES = {
    "packed, self": ({}, (q, q, q)),
    "packed, keys are values": ({}, (q, second, second)),
    "packed, all differ": ({}, (q, second, third)),
    "separate": ({"kdim": 6, "vdim": 5}, (q, second[..., :6], third[..., :5])),
}
PRESETS = {
    "published": {**presets.PUBLISHED, "lr": 0.1},
    "minibatch": {**presets.PUBLISHED, "lr": 0.1, "hessian_action": "minibatch"},
    "spectral": {**DEFAULT, "pair_every": 2},
    "blocks": {**presets.PUBLISHED, "lr": 0.1, "block_size": 4},
}


def assert_same_layers(opt, twin) -> None:
    names = [layer.name for layer in twin.layers]
    assert [layer.name for layer in opt.layers] == [*names[:3], "out_proj"]
    for one, two in zip(opt.layers, twin.layers, strict=True):
        torch.testing.assert_close(one.W(), two.W(), **TIGHT)
        assert one.kept.keys() == two.kept.keys()
        for name, tensor in one.kept.items():
            # 1/s'y of a block's small pair carries the rounding of a difference of gradients
            torch.testing.assert_close(tensor, two.kept[name], rtol=1e-7, atol=1e-8)


@DEFAULTS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_it_is_four_linears(method, bias, case, preset):
    options, inputs = CASES[case]
    model = attention(bias, **options)
    twin = ByLinear(model)
    opt, by_linear = method(model, **PRESETS[preset]), method(twin, **PRESETS[preset])
    assert opt.coverage().share == 1.0
    need = iter(range(2 * STEPS))
    closure = closure_of(
        opt, lambda: model(*inputs, need_weights=next(need) % 3 == 0)[0], TARGET
    )  # the weights of attention take another way
    again = closure_of(by_linear, lambda: twin(*inputs), TARGET)
    for _ in range(STEPS):
        assert opt.step(closure).item() == pytest.approx(by_linear.step(again).item(), rel=1e-10)
    assert_same_layers(opt, by_linear)
    assert F.linear is LINEAR


@DEFAULTS
def test_evaluation_mode_and_a_warm_start(method):
    """Where torch would take its fused attention, which calls no F.linear."""
    model = attention().eval()
    model.add_zero_attn = False
    fast = torch.backends.mha.get_fastpath_enabled()
    opt = method(model, **PRESETS["published"])
    opt.warm_start([(q, q, q), (second, second, second)])
    assert all(layer.warm_batches == 2 for layer in opt.layers)
    expected = sum(
        F.pad(x.flatten(0, 1), (0, 1), value=1.0).T @ F.pad(x.flatten(0, 1), (0, 1), value=1.0)
        / (3 * x.shape[1])
        for x in (q, second)
    ) / 2  # fmt: skip
    for layer in opt.layers[:3]:
        torch.testing.assert_close(layer["A"], expected, **TIGHT)
    assert F.linear is LINEAR and torch.backends.mha.get_fastpath_enabled() is fast
    with torch.no_grad():
        model(q, q, q)


def test_a_use_that_fails_leaves_torch_as_it_was():
    model = attention()
    opt = KBFGS(model, **PRESETS["published"])
    with pytest.raises(AssertionError), opt.first_pass():
        model(q, q, q[..., :3])
    assert F.linear is LINEAR and torch.backends.mha.get_fastpath_enabled()
    opt.step(closure_of(opt, lambda: model(q, q, q)[0], TARGET))


def test_what_an_interrupt_leaves_behind():
    model = attention()
    opt = KBFGS(model, **PRESETS["published"])
    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), opt.first_pass():
        model(q, q, q)
    assert F.linear is not LINEAR  # torch calls no hooks then
    torch.testing.assert_close(F.linear(q, torch.eye(E, dtype=q.dtype)), q)
    handle.remove()
    opt.step(closure_of(opt, lambda: model(q, q, q)[0], TARGET))
    assert F.linear is LINEAR
    model.register_forward_hook(lambda *_: opt.close(), prepend=True)
    with opt.first_pass():
        model(q, q, q)
    assert F.linear is LINEAR and opt.closed


def interrupt(*_):
    raise KeyboardInterrupt


@DEFAULTS
def test_recomputed_in_backward(method):
    runs = []
    for way in (lambda m, *x: m(*x), lambda m, *x: checkpoint(m, *x, use_reentrant=False)):
        model = attention(bias=False)
        opt = method(model, **PRESETS["minibatch"])
        closure = closure_of(
            opt, lambda way=way, model=model: way(model, q, second, third)[0], TARGET
        )
        for _ in range(3):
            opt.step(closure)
        runs.append(snapshot(model, opt))
    assert_same(*runs)


@DEFAULTS
@ACTIONS
def test_checkpoints_and_what_is_said(method, action):
    """Three layers are parts of one parameter: its state holds them all."""

    def build():
        model = attention()
        opt = method(model, **{**PRESETS["published"], "hessian_action": action})
        return model, opt, closure_of(opt, lambda: model(q, second, third)[0], TARGET)

    model, opt, closure = build()
    for _ in range(3):
        opt.step(closure)
    assert {"q.M", "k.H_a", "v.counts_g"} <= set(opt.state[model.in_proj_weight])
    assert sum(len(group["params"]) for group in opt.param_groups) == 4
    saved = copy.deepcopy(opt.state_dict())
    assert sorted(saved["state"]) == [0, 1, 2, 3]
    twin, resumed, again = build()
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for _ in range(3):
        opt.step(closure)
        resumed.step(again)
    assert_same(snapshot(model, opt), snapshot(twin, resumed))
    assert [(row.name, row.parameters) for row in opt.coverage()] == [
        ("q", 72), ("k", 72), ("v", 72), ("out_proj", 72),
    ]  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 4 * 72


@DEFAULTS
@pytest.mark.parametrize("flat", [False, True])
def test_checkpoints_of_torch_s_tools(method, flat):
    """Names of parts and of blocks in them."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, twin = attention(), attention()
    opt, other = (method(m, block_size=5, pair_every=2) for m in (model, twin))
    closure = closure_of(opt, lambda: model(q, second, third)[0], TARGET)
    again = closure_of(other, lambda: twin(q, second, third)[0], TARGET)
    for _ in range(3):
        opt.step(closure)
    state = get_optimizer_state_dict(model, opt, options=options)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, state, options=options)
    for _ in range(3):
        opt.step(closure)
        other.step(again)
    assert_same(snapshot(model, opt), snapshot(twin, other))


@DEFAULTS
def test_norms_of_gradients_count_a_parameter_once(method):
    """Clipping takes the norm of all gradients together, not one per part."""
    model = attention()
    twin = ByLinear(model)
    options = {**PRESETS["published"], "max_grad_norm": 0.01, "weight_decay": 0.1}
    opt, by_linear = method(model, **options), method(twin, **options)
    closure = closure_of(opt, lambda: model(q, q, q)[0], TARGET)
    again = closure_of(by_linear, lambda: twin(q, q, q), TARGET)
    for _ in range(4):
        assert opt.step(closure).item() == pytest.approx(by_linear.step(again).item(), rel=1e-10)
    assert_same_layers(opt, by_linear)


@DEFAULTS
def test_frozen_halves(method):
    model = attention()
    opt = method(model, **PRESETS["published"])
    closure = closure_of(opt, lambda: model(q, second, third)[0], TARGET)
    for frozen, other_half in (("weight", "bias"), ("bias", "weight")):
        getattr(model, "in_proj_" + frozen).requires_grad_(False)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(2):
            opt.step(closure)
        after = dict(model.named_parameters())
        assert torch.equal(before["in_proj_" + frozen], after["in_proj_" + frozen])
        assert not torch.equal(before["in_proj_" + other_half], after["in_proj_" + other_half])
        getattr(model, "in_proj_" + frozen).requires_grad_(True)


def test_sixteen_bits_and_autocast():
    torch.manual_seed(0)
    x = torch.randn(4, 6, E)
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(E, E), nn.Linear(E, E))
        block = nn.MultiheadAttention(E, HEADS, batch_first=True, bias=dtype is torch.bfloat16)
        block, model = block.to(dtype), model.to(dtype)
        both = nn.ModuleList([model, block])
        opt = KBFGS(both, lr=0.05)

        def forward(dtype=dtype, block=block, model=model):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
                h = model(x.to(dtype))
                return block(h, h, h)[0].float()

        closure = closure_of(opt, forward, x)
        losses = [opt.step(closure).item() for _ in range(STEPS)]
        assert losses[-1] < losses[0]
        assert all(int(counts["accepted_a"]) for counts in opt.diagnostics().values())


class Block(nn.Module):
    """As transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            E, HEADS, 16, dropout=0.1, batch_first=True, dtype=torch.float64
        )

    def forward(self, x):
        return self.layer(x)


@DEFAULTS
def test_a_transformer_of_torch(method):
    torch.manual_seed(0)
    model = Block()
    with pytest.warns(UserWarning, match="LayerNorm is no kind"):
        opt = method(model, lr=0.05)
    names = [layer.name for layer in opt.layers]
    assert names == [
        "layer.self_attn.q", "layer.self_attn.k", "layer.self_attn.v", "layer.self_attn.out_proj",
        "layer.linear1", "layer.linear2",
    ]  # fmt: skip
    closure = closure_of(opt, lambda: model(q), TARGET)
    losses = [opt.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    twin = pickle.loads(pickle.dumps(model))  # and a copy carries no hooks that work
    copy.deepcopy(model)(q).sum().backward()
    twin(q).sum().backward()
    opt.close()
    del opt
    gc.collect()
    assert F.linear is LINEAR
    assert not model.layer.self_attn._forward_hooks and not model.layer.self_attn._forward_pre_hooks


def test_groups_of_layers_that_share_a_bias():
    """Three weights, and the bias of each is a part of one parameter."""
    model = attention(kdim=3, vdim=5)
    with pytest.raises(ValueError, match="layers 'q' and 'k' have parts of one bias"):
        KBFGS(model, groups=[{"params": model.q_proj_weight, "lr": 0.1}])
    own = [model.q_proj_weight, model.k_proj_weight, model.v_proj_weight]
    opt = KBFGS(model, groups=[{"params": own, "lr": 0.1}])
    assert [len(group["params"]) for group in opt.param_groups] == [2, 4]


def test_exclude_and_what_is_not_covered():
    model = nn.ModuleDict(
        {"a": attention(), "b": nn.Linear(3, 2), "c": attention(add_bias_kv=True)}
    )
    with pytest.warns(UserWarning, match="KBFGS covers 9 layers") as said:
        opt = KBFGS(model)
    assert "c.bias_k, c.bias_v" in str(said[0].message)
    reasons = {row.name: row.reason for row in opt.coverage() if not row.covered}
    assert reasons["c.bias_k"] == "it is no matrix of its MultiheadAttention"
    out = KBFGSL(model, exclude=["a.out_proj", "c"], fallback=torch.optim.SGD)
    assert [layer.name for layer in out.layers] == ["a.q", "a.k", "a.v", "b"]
    # A parameter of which a part is left out goes as a whole.
    part = KBFGS(model, exclude=["a.q", "c"], fallback=torch.optim.SGD)
    assert [layer.name for layer in part.layers] == ["a.out_proj", "b"]

    class Own(nn.MultiheadAttention):
        pass

    own = nn.ModuleList([Own(E, HEADS), nn.Linear(3, 2)])
    with pytest.warns(UserWarning, match="Own is a subclass of MultiheadAttention"):
        opt = KBFGS(own)
    reasons = {row.name: row.reason for row in opt.coverage() if not row.covered}
    assert reasons["0.out_proj.weight"] == "its nn.MultiheadAttention is not covered"
