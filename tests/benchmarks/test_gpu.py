"""benchmarks/gpu.py without a GPU: what is trained, what is shown, the refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def run(name: str, lr: float, seed: int, loss: float) -> dict:
    config = {"optimizer": name, "settings": {"lr": lr}, "seed": seed}
    return {"config": config, "rows": [{"train_loss": 500.0}, {"train_loss": loss}]}


def test_all_are_trained_alike() -> None:
    configs = gpu.configs()
    assert {(c.epochs, c.schedule, c.precision, c.device) for c in configs} == {
        (20, "cosine", "tf32", "cuda")
    }
    assert {c.optimizer: c.captured for c in configs} == {
        "kbfgs": True, "kbfgsl": True, "adamw": True, "muon": False,
    }  # fmt: skip
    ours = [c.settings.given() for c in configs if c.optimizer in ("kbfgs", "kbfgsl")]
    assert ours == [{}] * 4  # as their constructors make them


def test_the_median_of_the_seeds_and_the_best_of_the_rates_are_shown() -> None:
    runs = [run("kbfgs", 0.05, seed, loss) for seed, loss in enumerate((3.0, 1.0, 2.0))]
    runs += [run("adamw", lr, 0, loss) for lr, loss in ((1e-3, 9.0), (2e-3, 8.0), (5e-3, 10.0))]
    found = [(r["config"]["optimizer"], r["rows"][-1]["train_loss"]) for r in gpu.shown(runs)]
    assert found == [("kbfgs", 2.0), ("adamw", 8.0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
