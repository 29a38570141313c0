"""torch.compile: same numbers, nothing compiled again from step to step, clear errors."""

import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from kbfgs_ext import KBFGS
from tests.optim.models import METHODS, assert_same, mlp, rows, snapshot

STEPS = 5


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


OLD = Version(torch.__version__) < Version("2.13")  # 2.11 compiles nothing beside a hook


def small():
    torch.manual_seed(0)
    return mlp(5, 7, 3, dtype=torch.float32)


def train(model, opt, steps=STEPS, loss_function=F.mse_loss):
    x, target = rows(16, 5, torch.float32), rows(16, 3, torch.float32, seed=1)

    def closure():
        opt.zero_grad()
        loss = loss_function(model(x), target)
        loss.backward()
        return loss

    return [opt.step(closure).item() for _ in range(steps)]


def evaluate(model):
    with torch.no_grad():
        model(rows(16, 5, torch.float32))


def eager(method):
    model = small()
    opt = method(model)
    return train(model, opt), model, opt


@METHODS
@pytest.mark.parametrize("order", ["before", "after", "in place"])
def test_compiled_model_takes_the_eager_steps(method, order, counter):
    """Compiled before or after the optimizer is made; a second round compiles nothing."""
    losses, plain, plain_opt = eager(method)
    model = small()
    if order == "before":
        compiled = torch.compile(model, backend=counter)
        opt = method(compiled)
    elif order == "after":
        opt = method(model)
        compiled = torch.compile(model, backend=counter)
    else:
        opt = method(model)
        model.compile(backend=counter)
        compiled = model
    assert train(compiled, opt) == losses
    assert_same(snapshot(model, opt), snapshot(plain, plain_opt))
    frames = counter.frame_count
    assert frames > 0 or OLD
    train(compiled, opt)
    assert counter.frame_count == frames
    evaluate(compiled)
    frames = counter.frame_count
    train(compiled, opt)
    evaluate(compiled)
    assert counter.frame_count == frames


@METHODS
def test_compiled_attention(method, counter):
    """Its calls of F.linear are seen inside a compiled model too."""
    x, target = rows(12, 8, torch.float32).view(3, 4, 8), rows(12, 8, torch.float32, seed=1)
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
        opt = method(model, lr=0.1)
        called = torch.compile(model, backend=counter) if compiled else model

        def closure(opt=opt, called=called):
            opt.zero_grad()
            loss = F.mse_loss(called(x, x, x)[0].flatten(0, 1), target)
            loss.backward()
            return loss

        losses = [opt.step(closure).item() for _ in range(STEPS)]
        assert all(int(counts["accepted_a"]) for counts in opt.diagnostics().values())
        runs.append((losses, snapshot(model, opt)))
        frames = counter.frame_count
    for _ in range(2):
        opt.step(closure)
    assert counter.frame_count == frames
    assert frames > 0 or OLD
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)


def test_compiled_loss(counter):
    losses, _, _ = eager(KBFGS)
    model = small()
    opt = KBFGS(model)
    assert train(model, opt, loss_function=torch.compile(F.mse_loss, backend=counter)) == losses
    assert counter.frame_count == 1


def test_full_graph_says_what_to_do(counter):
    model = small()
    opt = KBFGS(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="use fullgraph=False"):
        train(compiled, opt, steps=1)
    train(model, opt, steps=1)  # nothing is left behind


@METHODS
def test_checkpoint_fits_compiled_and_plain(method):
    """The names of a compiled model's layers are those of the model in it."""
    _, plain, opt = eager(method)
    other = small()
    other.load_state_dict(plain.state_dict())
    resumed = method(torch.compile(other, backend="eager"))
    resumed.load_state_dict(opt.state_dict())
    assert train(other, resumed) == train(plain, opt)
