"""A convolution is Linear on its patches: whole trajectories, to rounding."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kbfgs_ext import KBFGS, DirectionRule, FactorRule
from tests.optim.loops import TIGHT, assert_one_trajectory, images
from tests.optim.models import BALANCED, METHODS, absolute, assert_resumes, closure_of, snapshot

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
STEPS = 12


def unfolded(x: torch.Tensor, conv) -> torch.Tensor:
    """Patches of images (B, C, size) as (B, places..., C*kernel), one place after the other."""
    if conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        around = [(t // 2, t - t // 2) for t in total]
    else:
        around = [(0, 0)] * len(conv.kernel_size) if conv.padding == "valid" else [
            (p, p) for p in conv.padding
        ]  # fmt: skip
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, [p for pair in reversed(around) for p in pair], mode)
    reach = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    starts = [
        range(0, size - r + 1, s)
        for size, r, s in zip(x.shape[2:], reach, conv.stride, strict=True)
    ]
    rows = []
    for start in itertools.product(*starts):
        taken = [slice(i, i + r, d) for i, r, d in zip(start, reach, conv.dilation, strict=True)]
        rows.append(x[(slice(None), slice(None), *taken)].flatten(1))
    return torch.stack(rows, 1).unflatten(1, [len(s) for s in starts])


class OnPatches(nn.Module):
    """What a convolution computes, by a Linear for every group."""

    def __init__(self, conv) -> None:
        super().__init__()
        self.conv = [conv]  # its geometry
        d_out, *rest = conv.weight.shape
        groups, bias, d_in = conv.groups, conv.bias is not None, math.prod(rest)
        self.linears = nn.ModuleList(
            nn.Linear(d_in, d_out // groups, bias, dtype=torch.float64) for _ in range(groups)
        )
        with torch.no_grad():
            for linear, W in zip(self.linears, conv.weight.flatten(1).chunk(groups), strict=True):
                linear.weight.copy_(W)
            if bias:
                for linear, b in zip(self.linears, conv.bias.chunk(groups), strict=True):
                    linear.bias.copy_(b)
        for linear in self.linears:
            linear.weight.requires_grad_(conv.weight.requires_grad)

    def forward(self, x):
        inputs = x.chunk(len(self.linears), 1)
        outputs = [
            linear(unfolded(x, self.conv[0]))
            for linear, x in zip(self.linears, inputs, strict=True)
        ]
        return torch.cat(outputs, -1).movedim(-1, 1)


def twin_of(model: nn.Module) -> nn.Module:
    """The same network with a Linear for every convolution."""
    made: dict[int, nn.Module] = {}

    def replace(module):
        if isinstance(module, tuple(CONVS.values())):
            return made.setdefault(id(module), OnPatches(module))
        twin = copy.copy(module)
        twin._modules = {name: replace(child) for name, child in module._modules.items()}
        twin._parameters = {
            name: p if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)
            for name, p in module._parameters.items()
        }
        return twin

    return replace(model)


def network(*convs: nn.Module, x: torch.Tensor) -> nn.Sequential:
    """Convolutions with Tanh between them, and a Linear of 3 outputs behind."""
    layers: list[nn.Module] = []
    for conv in convs:
        layers += [conv, nn.Tanh()]
    body = nn.Sequential(*layers, nn.Flatten()).double()
    return nn.Sequential(body, nn.Linear(body(x).shape[1], 3, dtype=torch.float64))


GEOMETRIES = {
    "1x1": (2, (2, 4, 3, 3), dict(kernel_size=1)),
    "stride k": (2, (3, 2, 6, 6), dict(kernel_size=3, stride=3)),
    "strided": (2, (3, 2, 7, 6), dict(kernel_size=(3, 2), stride=(2, 1))),
    "padded": (2, (3, 2, 5, 4), dict(kernel_size=3, padding=(2, 1))),
    "dilated": (2, (3, 2, 8, 7), dict(kernel_size=(2, 3), dilation=(3, 2), padding=1, stride=2)),
    "reflect": (2, (3, 2, 5, 6), dict(kernel_size=3, padding=(2, 1), padding_mode="reflect")),
    "replicate": (2, (3, 2, 4, 4), dict(kernel_size=3, padding=1, padding_mode="replicate")),
    "circular": (2, (3, 2, 4, 5), dict(kernel_size=3, padding=1, padding_mode="circular")),
    "same": (2, (3, 2, 4, 5), dict(kernel_size=(4, 3), padding="same", dilation=(1, 2))),
    "same reflect": (2, (3, 2, 6, 5),
                     dict(kernel_size=(4, 3), padding="same", padding_mode="reflect")),
    "valid": (2, (3, 2, 4, 5), dict(kernel_size=2, padding="valid")),
    "no bias": (2, (3, 2, 5, 4), dict(kernel_size=3, padding=1, bias=False)),
    "grouped": (2, (3, 6, 5, 4), dict(kernel_size=3, padding=1, groups=3)),
    "grouped, no bias": (2, (3, 4, 6, 5), dict(kernel_size=2, stride=2, groups=2, bias=False)),
    "depthwise": (2, (3, 4, 5, 5), dict(kernel_size=3, dilation=2, padding=2, groups=4)),
    "of many groups": (2, (2, 40, 3, 3), dict(kernel_size=3, padding=1, groups=40)),
    "grouped 1d": (1, (4, 4, 9), dict(kernel_size=3, padding=1, padding_mode="circular", groups=2)),
    "1d": (1, (4, 2, 9), dict(kernel_size=3, stride=2, dilation=2, padding=2)),
    "3d": (3, (2, 2, 4, 3, 4), dict(kernel_size=(2, 3, 2), padding=1, stride=(1, 2, 2))),
}  # fmt: skip


@METHODS
@ACTIONS
@pytest.mark.parametrize("case", GEOMETRIES)
def test_a_convolution_is_linear_on_its_patches(method, action, case):
    torch.manual_seed(0)
    n, shape, options = GEOMETRIES[case]
    x = images(*shape)
    d_out = 2 * options["groups"] if "groups" in options else 5
    model = network(CONVS[n](shape[1], d_out, **options), x=x)
    assert_one_trajectory(method, model, twin_of(model), x, hessian_action=action)


@METHODS
@ACTIONS
def test_a_pointwise_convolution_is_linear_on_pixels(method, action):
    """In channels-last rows, whole networks of them; and with steps of balanced length."""
    torch.manual_seed(0)
    x = images(4, 3, 2, 3)
    convs = nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 3, 1, bias=False)
    model = nn.Sequential(*convs, nn.Flatten(2)).double()
    pixels = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    for at in (0, 2):
        pixels[at].load_state_dict({k: v.flatten(1) if v.dim() > 1 else v
                                    for k, v in model[at].state_dict().items()})  # fmt: skip
    options = {"hessian_action": action, "direction": BALANCED, "lr": 0.05}
    opt, other = method(model, **options), method(pixels, **options)
    target = images(4, 3, 6, seed=1)
    closure = closure_of(model, opt, x, target)

    def again():
        other.zero_grad()
        out = pixels(x.permute(0, 2, 3, 1)).flatten(1, 2).mT
        loss = (out - target).square().sum() / 8
        loss.backward()
        return loss

    for _ in range(STEPS):
        assert opt.step(closure).item() == pytest.approx(other.step(again).item(), rel=1e-10)
    for one, two in zip(opt.layers, other.layers, strict=True):
        for name, tensor in one.kept.items():
            torch.testing.assert_close(tensor, two.kept[name], **TIGHT)


class Reused(nn.Module):
    """A convolution that is used on images of two sizes, and its weight under another geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.wide = nn.Conv2d(2, 2, 3, padding=2, dilation=2)
        self.wide.weight, self.wide.bias = self.conv.weight, self.conv.bias

    def forward(self, x):
        x = torch.tanh(self.conv(x))
        return torch.tanh(self.conv(x[..., ::2])) + torch.tanh(self.wide(x)[..., ::2])


@METHODS
@ACTIONS
def test_a_reused_convolution(method, action):
    torch.manual_seed(0)
    x = images(3, 2, 4, 6)
    model = network(Reused(), x=x)
    twin = twin_of(model)
    one, two = twin[0][0].conv.linears[0], twin[0][0].wide.linears[0]
    two.weight, two.bias = one.weight, one.bias
    assert_one_trajectory(method, model, twin, x, hessian_action=action)


OPTIONS = [
    {"factors": absolute(update_every=3)},
    {"pair_every": 2},
    {"factors": absolute(restart_after=1)},
    {"block_size": 10},
    {"direction": BALANCED},
    {"direction": DirectionRule(nesterov=False), "factors": FactorRule(), "lr": 0.01},
    {
        "direction": DirectionRule(step_length="direction"),
        "factors": absolute(initial_scale="damping"),
        "lr": 0.01,
    },
    {"weight_decay": 0.01, "safeguard": False},
    {"backend": "reference"},
]


@METHODS
@ACTIONS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(method, action, options):
    torch.manual_seed(0)
    x = images(3, 2, 5, 5)
    convs = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 2, groups=2)
    model = network(*convs, x=x)
    assert_one_trajectory(method, model, twin_of(model), x, hessian_action=action, **options)


@METHODS
@ACTIONS
def test_groups_in_blocks(method, action):
    """Every group has as many, and each is that of a Linear in blocks."""
    torch.manual_seed(0)
    x = images(6, 10, 2, 3)
    model = network(nn.Conv2d(10, 8, 1, groups=2), x=x)
    options = {"block_size": 3, "factors": absolute(restart_after=2), "hessian_action": action}
    assert_one_trajectory(method, model, twin_of(model), x, **options)
    (conv, _) = method(model, **options).layers
    assert [f.n for f in conv.activations] == [3, 3] and [f.n for f in conv.gradients] == [2, 2]


@METHODS
@ACTIONS
def test_channels_last_stays_and_changes_nothing(method, action):
    torch.manual_seed(0)
    x = images(3, 3, 5, 4)
    convs = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 2, bias=False, groups=2)
    model = network(*convs, x=x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    a, b = (method(m, lr=0.1, hessian_action=action) for m in (model, last))
    target = images(3, 3, seed=1)
    rows = x.contiguous(memory_format=torch.channels_last)
    planned = b.memory_usage()
    for _ in range(STEPS):
        a.step(closure_of(model, a, x, target))
        b.step(closure_of(last, b, rows, target))
    assert b.memory_usage() == planned
    for conv in (last[0][0], last[0][2]):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not conv.weight.is_contiguous()
    before, after = snapshot(model, a), snapshot(last, b)
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, after[name], **TIGHT)


@METHODS
def test_frozen_halves_and_unfrozen_ones(method):
    torch.manual_seed(0)
    x = images(3, 2, 5, 4)
    model = network(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 2), x=x).to(
        memory_format=torch.channels_last
    )
    opt = method(model, lr=0.1)
    closure = closure_of(model, opt, x, images(3, 3, seed=1))
    conv = model[0][0]
    for name, other in (("weight", "bias"), ("bias", "weight")):
        getattr(conv, name).requires_grad_(False)
        before = {k: p.detach().clone() for k, p in conv.named_parameters()}
        for _ in range(2):
            opt.step(closure)
        assert torch.equal(getattr(conv, name), before[name])
        assert not torch.equal(getattr(conv, other), before[other])
        getattr(conv, name).requires_grad_(True)


@METHODS
@ACTIONS
def test_checkpoints(method, action):
    def build():
        torch.manual_seed(0)
        x = images(3, 2, 5, 4)
        model = network(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 2, groups=2), x=x)
        opt = method(model, lr=0.1, hessian_action=action)
        return model, opt, closure_of(model, opt, x, images(3, 3, seed=1))

    assert_resumes(build)


@METHODS
@ACTIONS
def test_warm_start(method, action):
    torch.manual_seed(0)
    x = images(4, 2, 5, 4)
    model = network(nn.Conv2d(2, 4, 3, padding=1), x=x)
    twin = twin_of(model)
    opts = [method(m, hessian_action=action) for m in (model, twin)]
    for opt in opts:
        opt.warm_start([x[:1], x[1:]])
    one, two = (opt.layers[0].activations[0].average for opt in opts)
    torch.testing.assert_close(one, two, **TIGHT)


def test_images_without_a_batch_and_under_vmap():
    torch.manual_seed(0)
    x, target = images(4, 2, 5, 4), images(4, 3, seed=1)
    model = network(nn.Conv2d(2, 4, 3, bias=False), x=x)
    model[0][-1] = nn.Flatten(-3)
    twins = [copy.deepcopy(model) for _ in range(3)]
    ways = [
        lambda m: m(x),
        lambda m: torch.stack([m(one) for one in x]),
        lambda m: torch.vmap(m)(x),
    ]
    opts = [KBFGS(twin, lr=0.1) for twin in twins]
    for _ in range(3):
        for twin, opt, way in zip(twins, opts, ways, strict=True):

            def closure(opt=opt, twin=twin, way=way):
                opt.zero_grad()
                loss = (way(twin) - target).square().mean()
                loss.backward()
                return loss

            opt.step(closure)
    for other in twins[1:]:
        for p, q in zip(twins[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, **TIGHT)


@METHODS
@ACTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_in_other_dtypes(method, action, dtype):
    torch.manual_seed(0)
    x, target = images(16, 2, 6, 6), images(16, 3, seed=1).to(dtype)
    convs = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, groups=2)
    model = network(*convs, x=x).to(dtype)
    opt = method(model, lr=0.1, hessian_action=action)
    closure = closure_of(model, opt, x.to(dtype), target)
    losses = [opt.step(closure).item() for _ in range(STEPS)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(int(counts["accepted_a"]) > 0 for counts in opt.diagnostics().values())
