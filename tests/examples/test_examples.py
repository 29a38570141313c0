"""Every example runs against the real package; one that is not installed is skipped by name."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import kbfgs_ext

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST_EXAMPLE = 60  # lines
NEEDS = {
    "lightning_automatic": "lightning",
    "lightning_manual": "lightning",
    "with_accelerate": "accelerate",
    "with_transformers": "transformers",
    "with_timm": "timm",
    "with_tensorboard": "tensorboard",
}


def load(name: str, monkeypatch) -> types.ModuleType:
    """The example as a module; skips where its package is missing."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f'needs {NEEDS[name]}: pip install ".[examples]"')
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def assert_learns(losses: list[float]) -> None:
    assert all(torch.tensor(losses).isfinite())
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_documented(path):
    assert len(path.read_text().splitlines()) <= LONGEST_EXAMPLE
    assert path.name in (ROOT / "docs/frameworks.md").read_text()


def test_plain_loop(monkeypatch):
    example = load("plain_loop", monkeypatch)
    losses = example.with_closure(2)
    assert losses == example.without_closure(2)
    assert_learns(losses)


def test_lightning_automatic(monkeypatch):
    example = load("lightning_automatic", monkeypatch)
    losses = example.main()
    assert len(losses) == 3 * 8  # one a step, not one a pass
    assert_learns(losses)


def test_lightning_automatic_clips(monkeypatch):
    assert_learns(load("lightning_automatic", monkeypatch).main(gradient_clip_val=1.0))


def test_lightning_refuses_to_accumulate(monkeypatch):
    example = load("lightning_automatic", monkeypatch)
    with pytest.raises(Exception, match="the closure adds to gradients from before the step"):
        example.main(accumulate_grad_batches=2)


def test_lightning_manual(monkeypatch):
    losses = load("lightning_manual", monkeypatch).main()
    assert len(losses) == 3 * 8
    assert_learns(losses)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, monkeypatch):
    example = load("with_accelerate", monkeypatch)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one per process, of any precision
    losses = example.main(cpu=True, mixed_precision=precision)
    assert len(losses) == 3 * 8
    assert_learns(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning_automatic", "with_accelerate"])
def test_two_processes(name, tmp_path):
    """By the framework's own launcher: the same weights on both, with DDP and with FSDP2."""
    pytest.importorskip(NEEDS[name], reason=f'needs {NEEDS[name]}: pip install ".[examples]"')
    weights = {}
    for wrapper in ("ddp", "fsdp2"):
        ended = subprocess.run(
            [sys.executable, ROOT / "tests/examples/launched.py", name, wrapper, tmp_path],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
        assert one["size"] == two["size"] == 2 and one["cut"] == (wrapper == "fsdp2")
        assert one["weights"] == two["weights"] and one["losses"] != two["losses"]
        assert_learns(one["losses"])
        weights[wrapper] = one["weights"]
    assert weights["fsdp2"] == pytest.approx(weights["ddp"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_sharded_loop_resumes_as_if_nothing_had_happened(ranks, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from sharded_loop import dist, main; whole = main()\n"
        "assert main(folder=sys.argv[1]) == whole and main(folder=sys.argv[1]) == whole[6:]\n"
        "print(f'losses {whole}')\n"
        "dist.barrier(), dist.destroy_process_group()\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "examples")))
    ended = subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), script, tmp_path / "saved"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    said = re.findall(r"losses (\[.*?\])", ended.stdout)
    assert len(said) == ranks
    for losses in map(json.loads, said):
        assert_learns(losses)


def test_transformers(monkeypatch, tmp_path):
    losses = load("with_transformers", monkeypatch).main(folder=str(tmp_path))
    assert len(losses) == 3 * 4
    assert_learns(losses)


def test_transformers_resumes_as_if_nothing_had_happened(monkeypatch, tmp_path):
    example = load("with_transformers", monkeypatch)
    options = {"folder": str(tmp_path), "save_strategy": "steps", "save_steps": 6}
    whole = example.main(**options)
    saved = tmp_path / "checkpoint-6"
    assert (saved / "optimizer.pt").exists()
    train = example.KBFGSTrainer.train
    monkeypatch.setattr(
        example.KBFGSTrainer,
        "train",
        lambda self: train(self, resume_from_checkpoint=str(saved)),
    )
    assert example.main(**options)[6:] == whole[6:]


def test_transformers_refuses_what_it_cannot_do(monkeypatch, tmp_path):
    example = load("with_transformers", monkeypatch)
    with pytest.raises(ValueError, match="takes neither gradient_accumulation_steps nor fp16"):
        example.main(folder=str(tmp_path), gradient_accumulation_steps=2)


def test_timm(monkeypatch, capsys):
    assert_learns(load("with_timm", monkeypatch).main())
    covered = re.search(r"(\d+) layers covered", capsys.readouterr().out)
    # qkv, proj and the MLP of each block, the embedding of the patches and the head
    assert int(covered[1]) == 2 * 4 + 2


def test_tensorboard(monkeypatch, tmp_path):
    example = load("with_tensorboard", monkeypatch)
    losses = example.main(folder=str(tmp_path))
    assert_learns(losses)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(tmp_path)).Reload()
    tags = written.Tags()["scalars"]
    assert {"loss", "kbfgs/steps", "kbfgs/scale", "kbfgs_layers/0/accepted"} <= set(tags)
    accepted = [event.value for event in written.Scalars("kbfgs_layers/2/accepted")]
    rejected = [event.value for event in written.Scalars("kbfgs_layers/2/rejected")]
    assert sum(accepted) + sum(rejected) == len(losses) / 10  # pair_every


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs/reference.md").read_text()
    for name in kbfgs_ext.__all__:
        assert name == "ops" or f"::: kbfgs_ext.{name}\n" in page, name
