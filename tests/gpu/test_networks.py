"""Whole steps of the networks that people train, with the defaults too: on a GPU as on the CPU."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kbfgs_ext import CapturedStep
from tests.optim.models import DEFAULTS, METHODS, closure_of, mlp, rows

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*no kind that is covered")]
GPU = torch.device("cuda")
ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
PERIOD = 3  # steps of the defaults, one of which has a second pass
OUT = 5


class OnePoint(nn.Module):
    """The mean of a sequence."""

    def forward(self, x):
        return x.mean(1)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=4, padding_mode="reflect", padding=1), nn.Tanh(),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(4 * 36, OUT),
    )  # fmt: skip


def attention():
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, OnePoint(), nn.Linear(16, OUT))


NETWORKS = {  # what makes it, the shape of an input, options
    "linear": (lambda: mlp(20, 33, 17, OUT), (20,), {}),
    "norm": (lambda: nn.Sequential(nn.Linear(20, 33), nn.LayerNorm(33), nn.Linear(33, OUT)),
             (20,), {}),
    "convolutions": (convolutions, (3, 6, 6), {}),
    "attention": (attention, (7, 16), {}),
    "blocks": (lambda: mlp(20, 33, 17, OUT), (20,), {"block_size": 8}),
}  # fmt: skip
# The gradient of the keys' bias is 0, so that the pairs of that layer are rounding errors.
EXACT = dict.fromkeys(NETWORKS, 1e-9) | {"attention": 1e-3}
ALL = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def batch(network, seed=0, dtype=torch.float32, device=GPU):
    shape = NETWORKS[network][1]
    x = rows(32, torch.Size(shape).numel(), torch.float64, seed).unflatten(1, shape)
    return x.to(device, dtype), rows(32, OUT, torch.float64, seed + 100).to(device, dtype)


def made(method, network, dtype=torch.float32, device=GPU, **options):
    make, _, more = NETWORKS[network]
    torch.manual_seed(0)
    model = make().to(device, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names what the fallback has
        return model, method(model, **more, **options)


def closures(model, opt, network, steps, **to):
    for k in range(steps):
        yield closure_of(model, opt, *batch(network, k, **to))


@ALL
@METHODS
@ACTIONS
def test_the_papers_steps_are_those_of_the_cpu(backend, method, network, action):
    assert_as_on_the_cpu(method, network, backend, hessian_action=action)


@ALL
@DEFAULTS
@ACTIONS
def test_the_defaults_steps_are_those_of_the_cpu(backend, method, network, action):
    assert_as_on_the_cpu(method, network, backend, hessian_action=action, pair_every=PERIOD)


def assert_as_on_the_cpu(method, network, backend, **options):
    """In float64, by losses and weights."""
    ends = []
    for device, name in ((torch.device("cpu"), "reference"), (GPU, backend)):
        model, opt = made(method, network, torch.float64, device, backend=name, **options)
        to = dict(dtype=torch.float64, device=device)
        losses = [opt.step(c).item() for c in closures(model, opt, network, 7, **to)]
        ends.append((losses, [p.detach().cpu() for p in model.parameters()]))
    (wanted, weights), (losses, mine) = ends
    assert losses == pytest.approx(wanted, rel=EXACT[network])
    if network != "attention":
        torch.testing.assert_close(mine, weights, rtol=1e-5, atol=1e-7)


@ALL
@DEFAULTS
@ACTIONS
def test_a_step_reads_nothing_back(backend, method, network, action):
    model, opt = made(method, network, backend=backend, hessian_action=action, pair_every=PERIOD)
    ready = list(closures(model, opt, network, 4 * PERIOD))
    for closure in ready[: 2 * PERIOD]:
        opt.step(closure)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for closure in ready[2 * PERIOD :]:
            opt.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses_of(model, half=None):
    def loss_of(x, target):
        with torch.autocast("cuda", half, enabled=half is not None):
            h = model(x)
        return (h.float() - target).square().sum() / (2 * len(x))

    return loss_of


@ALL
@DEFAULTS
@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["fp32", "bf16 autocast"])
def test_captured_steps_are_the_ordinary_ones(method, network, half):
    """With second passes in one step of three: two graphs."""
    ends = []
    for captured in (False, True):
        model, opt = made(method, network, pair_every=PERIOD)
        loss_of = losses_of(model, half)
        step = CapturedStep(opt, loss_of)

        def ordinary(x, target, opt=opt, loss_of=loss_of):
            def closure():
                opt.zero_grad()
                loss = loss_of(x, target)
                loss.backward()
                return loss

            return opt.step(closure)

        take = step if captured else ordinary
        losses = [take(*batch(network, k)).item() for k in range(6 * PERIOD)]
        assert not captured or len(step._graphs) == 2
        ends.append((losses, [p.detach().cpu() for p in model.parameters()]))
    (wanted, weights), (losses, mine) = ends
    rel = 1e-4 if half is None else 1e-2
    assert losses == pytest.approx(wanted, rel=rel)
    torch.testing.assert_close(mine, weights, rtol=rel, atol=rel)


@DEFAULTS
@pytest.mark.parametrize("network", ["linear", "norm", "convolutions"])
def test_captured_steps_may_follow_ordinary_ones(method, network):
    """And be followed by them: autograd's nodes belong to the stream of the step that made them."""
    ends = []
    for captured in (False, True):
        model, opt = made(method, network, pair_every=PERIOD)
        loss_of = losses_of(model)
        replay = CapturedStep(opt, loss_of)
        losses = []
        for k in range(8 * PERIOD):
            x, target = batch(network, k)

            def closure(opt=opt, loss_of=loss_of, x=x, target=target):
                opt.zero_grad()
                loss = loss_of(x, target)
                loss.backward()
                return loss

            ordinary = not captured or k < PERIOD or k >= 7 * PERIOD
            losses.append((opt.step(closure) if ordinary else replay(x, target)).item())
        assert replay.captured is captured
        ends.append(losses)
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)


@ALL
@DEFAULTS
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", ["autocast", "scaled", "parameters"])
def test_16_bits_on_the_kernels(method, network, half, how):
    """No op of a step on the reference, and it learns."""
    model, opt = made(method, network, pair_every=PERIOD)
    if how == "parameters":
        model, opt = made(method, network, half, pair_every=PERIOD)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8) if how == "scaled" else None
    x, target = batch(network)
    loss_of = losses_of(model, None if how == "parameters" else half)

    def closure():
        opt.zero_grad()
        loss = loss_of(x.to(half) if how == "parameters" else x, target)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    losses = []
    for _ in range(4 * PERIOD):
        more = {} if scaler is None else {"scaler": scaler}
        losses.append(opt.step(closure, **more).item())
        if scaler is not None:
            scaler.update()
        report = opt.explain()
        assert "on the reference: none" in report.splitlines()[0], report
    assert losses[-1] < 0.95 * losses[0]


def test_a_classifier_with_dropout_learns():
    """As in the README, with what a replay cannot have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4)).to(GPU)
    from kbfgs_ext import KBFGS

    opt = KBFGS(model)
    x, target = batch("linear")[0], torch.arange(32, device=GPU) % 4
    losses = []
    for _ in range(30):

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
    assert losses[-1] < 0.2 * losses[0]
