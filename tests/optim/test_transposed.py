"""A transposed convolution is Linear on the patches of an image with zeros between its pixels."""

import copy
import itertools

import pytest
import torch
from torch import nn

from kbfgs_ext import KBFGS, FactorRule, Precision, presets
from tests.optim.loops import assert_one_trajectory, images
from tests.optim.models import DEFAULTS, assert_resumes, closure_of

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
TYPES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class OnPatches(nn.Module):
    """What a transposed convolution computes, by a Linear: place after place of the output, the
    inputs that reach it, in the order of the kernel."""

    def __init__(self, conv) -> None:
        super().__init__()
        self.conv = [conv]
        self.linears = nn.ModuleList()
        for i, part in enumerate(conv.weight.detach().chunk(conv.groups)):
            W = part.transpose(0, 1).flatten(1)
            linear = nn.Linear(W.shape[1], W.shape[0], conv.bias is not None, dtype=W.dtype)
            linear.weight.data.copy_(W)
            if conv.bias is not None:
                linear.bias.data.copy_(conv.bias.detach().chunk(conv.groups)[i])
            self.linears.append(linear)

    def forward(self, x, size):
        each = zip(self.linears, x.chunk(len(self.linears), 1), strict=True)
        return torch.cat([self.group(linear, x, size) for linear, x in each], 1)

    def group(self, linear, x, size):
        (conv,) = self.conv
        sizes = conv.kernel_size, conv.stride, conv.dilation, conv.padding
        geometry = list(zip(*sizes, strict=True))
        rows = []
        for place in itertools.product(*map(range, size)):
            taken = []
            for taps in itertools.product(*(range(k) for k, *_ in geometry)):
                # out[i*stride + tap*dilation - padding] += x[i] * W[tap]
                at = [
                    divmod(o + p - t * d, s)
                    for o, t, (_, s, d, p) in zip(place, taps, geometry, strict=True)
                ]
                inside = all(
                    rest == 0 and 0 <= i < n for (i, rest), n in zip(at, x.shape[2:], strict=True)
                )
                index = (slice(None), slice(None), *(i for i, _ in at))
                taken.append(x[index] if inside else x.new_zeros(x.shape[:2]))
            rows.append(torch.stack(taken, -1).flatten(1))
        return linear(torch.stack(rows, 1)).mT.unflatten(-1, list(size))


class Net(nn.Module):
    """A transposed convolution, asked for a size or not, and a Linear."""

    def __init__(self, conv, x, size) -> None:
        super().__init__()
        self.conv, self.size = conv, size
        self.shape = conv(x, size).shape[2:]
        self.last = nn.Linear(conv(x, size).flatten(1).shape[1], 3, dtype=torch.float64)

    def forward(self, x):
        given = (self.shape,) if isinstance(self.conv, OnPatches) else (self.size,)
        return self.last(torch.tanh(self.conv(x, *given)).flatten(1))


GEOMETRIES = {
    "plain": (2, (3, 2, 3, 4), dict(kernel_size=3), None),
    "strided": (2, (3, 2, 3, 2), dict(kernel_size=(3, 2), stride=2, padding=1), None),
    "output padding": (2, (2, 3, 2, 3), dict(kernel_size=3, stride=3, output_padding=(2, 1)), None),
    "asked for a size": (2, (3, 2, 3, 2), dict(kernel_size=3, stride=2, padding=1), (6, 4)),
    "dilated": (2, (2, 2, 3, 3), dict(kernel_size=2, dilation=(2, 1), stride=(1, 2)), None),
    "cropped": (2, (2, 2, 4, 4), dict(kernel_size=2, padding=(2, 1), stride=2), None),
    "no bias": (2, (3, 2, 3, 3), dict(kernel_size=2, stride=2, bias=False), None),
    "1d": (1, (3, 2, 5), dict(kernel_size=4, stride=2, padding=1), None),
    "3d": (3, (2, 2, 2, 2, 2), dict(kernel_size=2, stride=2, padding=(1, 0, 0)), None),
    "grouped": (2, (3, 4, 3, 2), dict(kernel_size=(2, 3), stride=2, groups=2), None),
    "depthwise": (1, (3, 4, 5), dict(kernel_size=3, stride=2, padding=1, groups=4), (10,)),
    "grouped, no bias": (2, (3, 4, 3, 3), dict(kernel_size=2, groups=2, bias=False), None),
}  # fmt: skip


def build(case):
    torch.manual_seed(0)
    n, shape, options, size = GEOMETRIES[case]
    x = images(*shape)
    return Net(TYPES[n](shape[1], 4, dtype=torch.float64, **options), x, size), x


@DEFAULTS
@ACTIONS
@pytest.mark.parametrize("case", GEOMETRIES)
def test_it_is_linear_on_patches(method, action, case):
    model, x = build(case)
    twin = copy.deepcopy(model)
    twin.conv = OnPatches(model.conv)
    options = {**presets.PUBLISHED, "lr": 0.1, "hessian_action": action}
    assert_one_trajectory(method, model, twin, x, **options)


@DEFAULTS
@ACTIONS
@pytest.mark.parametrize("case", ["strided", "grouped"])
def test_checkpoints_blocks_and_restarts(method, action, case):
    def made():
        model, x = build(case)
        options = {"hessian_action": action, "factors": FactorRule(restart_after=1)}
        opt = method(model, lr=0.1, block_size=7, **options)
        return model, opt, closure_of(model, opt, x, images(3, 3, seed=1))

    opt, _ = assert_resumes(made)
    assert [f.n for f in opt.layers[0].activations] == [6, 7]  # a channel of six taps each


@pytest.mark.parametrize("copies", [False, True])
def test_memory_in_sixteen_bits(copies):
    """A weight that lies otherwise in memory has a 32-bit copy, or one of its own type."""
    model = nn.Sequential(nn.ConvTranspose1d(3, 4, 2)).to(torch.bfloat16)
    opt = KBFGS(model, precision=Precision(master_weights=copies))
    stated = opt.memory_usage()
    opt.step(
        closure_of(model, opt, *(torch.randn(5, n, k).bfloat16() for n, k in ((3, 6), (4, 7))))
    )
    (layer,) = opt.layers
    held = {
        t.untyped_storage().data_ptr(): t for t in (*layer.kept.values(), *layer.scratch.values())
    }
    assert ("W" in layer.scratch) == ("W" in stated) == (not copies)
    kept = sum(t.untyped_storage().nbytes() for t in held.values())
    assert kept == stated["total"] - stated["product"]
