"""The command lines, the terminal display and the plots."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import data, demo, plots
from benchmarks import train as command
from benchmarks.data import Dataset
from benchmarks.models import AUTOENCODERS, Autoencoder, cross_entropy
from benchmarks.optimizers import NAMES, Settings
from benchmarks.progress import Display
from benchmarks.training import Config, train


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs train a narrow autoencoder of the same depth, which takes a fraction of a second."""
    monkeypatch.setitem(AUTOENCODERS, "mnist", Autoencoder((784, 20, 15, 10, 5), cross_entropy))


@pytest.fixture
def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(50, 784, generator=generator)
    return Dataset.of("mnist", "noise (50)", "a test", pixels[:35], pixels[35:])


@pytest.fixture
def noise(images: Dataset, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The commands load ``images`` whatever they ask for."""
    monkeypatch.setattr(data, "load", lambda *args, **options: images)
    monkeypatch.setattr(demo, "embedded_digits", lambda: images)
    return images


def payload(optimizer: str, losses: list[float | None], status: str = "complete") -> dict:
    """What a run writes, as far as tables and plots read it."""
    rows = [
        {"epoch": i, "seconds": float(i), "train_loss": loss, "test_loss": loss}
        for i, loss in enumerate(losses)
    ]
    return {
        "status": status,
        "config": {"optimizer": optimizer, "settings": {}},
        "rows": rows,
    }


# ------------------------------------------------------------------ python -m benchmarks.train


def test_every_argument_reaches_the_configuration() -> None:
    line = (
        "--dataset curves --optimizer kbfgsl --lr 0.2 --damping 0.1 --damping-a 0.3 "
        "--damping-g 0.5 --pair-decay 0.4 --initial-scale damping "
        "--step-length layer --hessian-action ema "
        "--memory 7 --momentum 0.8 --epochs 3 "
        "--batch-size 50 --weight-decay 0 --seed 4 --device cpu --threads 1 --backend reference "
        "--no-safeguard --no-warm-start --max-seconds 9"
    )
    assert command.config_of(command.parser().parse_args(line.split())) == Config(
        dataset="curves",
        optimizer="kbfgsl",
        settings=Settings(
            lr=0.2,
            momentum=0.8,
            damping=0.1,
            damping_a=0.3,
            damping_g=0.5,
            pair_decay=0.4,
            initial_scale="damping",
            step_length="layer",
            memory=7,
            hessian_action="ema",
            backend="reference",
            safeguard=False,
        ),
        epochs=3,
        max_seconds=9.0,
        batch_size=50,
        weight_decay=0.0,
        warm_start=False,
        seed=4,
        device="cpu",
        threads=1,
    )


def test_an_empty_command_line_is_the_papers_setting() -> None:
    assert command.config_of(command.parser().parse_args([])) == Config()


@pytest.mark.parametrize("line", ["--dataset cifar", "--optimizer lion", "--epochs many"])
def test_usage_errors(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(line.split())
    assert line.split()[1] in capsys.readouterr().err


def test_a_run_from_the_command_line(
    noise: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    line = f"--optimizer adamw --epochs 2 --batch-size 16 --json {out}"
    assert command.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert "noise (50): 35 train + 15 test" in printed
    assert len([text for text in printed.splitlines() if text.split()[:1] == ["2"]]) == 1
    assert json.loads(out.read_text())["status"] == "complete"


def test_quiet_prints_nothing(noise: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--optimizer adamw --epochs 1 --batch-size 16 --quiet"
    assert command.main(line.split()) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--optimizer adamw --damping 1", "error: adamw has no setting damping"),
        ("--batch-size 100", "error: batch_size 100 is larger than the training set (35)"),
        ("--epochs -1", "error: epochs must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_one_line(
    noise: Dataset, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert command.main(line.split()) == 1
    assert capsys.readouterr().err == message + "\n"


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--data", str(tmp_path / "nowhere")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --data is not a folder")
    assert captured.err.count("\n") == 1


def test_exit_status_tells_how_a_run_ended(noise: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "--optimizer sgdm --lr 1e20 --epochs 2 --batch-size 16 --quiet"
    assert command.main(line.split()) == command.DIVERGED

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    assert command.main(["--quiet"]) == command.INTERRUPTED


# ------------------------------------------------------------------ display


def test_the_display_thins_out_lines_and_prints_the_last(images: Dataset) -> None:
    text = io.StringIO()
    display = Display(Console(file=text, width=100), every=2)
    train(Config(optimizer="adamw", epochs=3, batch_size=16), images, observer=display)
    firsts = [line.split()[0] for line in text.getvalue().splitlines() if line.strip()]
    assert firsts == ["adamw", "epoch", "0", "2", "3"]


# ------------------------------------------------------------------ demo and plots


def test_demo_writes_table_json_and_plot(
    noise: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    contenders = {name: demo.CONTENDERS[name] for name in ("kbfgs", "adamw")}
    monkeypatch.setattr(demo, "CONTENDERS", contenders)
    monkeypatch.setattr(demo, "BATCH", 16)
    assert demo.main(["--out", str(tmp_path), "--seconds", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "K-BFGS" in printed
    assert "AdamW" in printed
    runs = json.loads((tmp_path / "demo.json").read_text())["runs"]
    assert [run["config"]["optimizer"] for run in runs] == ["kbfgs", "adamw"]
    assert runs[0]["rows"][0]["train_loss"] == runs[1]["rows"][0]["train_loss"]  # one seed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_to_a_loss() -> None:
    run = payload("adamw", [500.0, 200.0, 90.0, 95.0, 80.0])
    assert demo.seconds_to(run, 200) == 1
    assert demo.seconds_to(run, 100) == 2
    assert demo.seconds_to(run, 70) is None


def test_every_optimizer_has_its_look() -> None:
    assert set(plots.LOOKS) == set(NAMES)
    assert len({look.colour for look in plots.LOOKS.values()}) == len(NAMES)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_are_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"plot.{suffix}"
    runs = [
        payload("kbfgs", [543.0, 150.0, 80.0]),
        payload("kbfgsl", [543.0, 151.0, 80.1]),
        payload("sgdm", [543.0, None], status="diverged"),
        payload("muon", [None], status="diverged"),
    ]
    plots.loss_against_seconds(runs, path, "a title", "a note")
    assert path.stat().st_size > 5_000


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    figure = plots.Figure(figsize=(6, 4))
    axis = figure.subplots()
    plots._panel(axis, [payload(name, [543.0, 80.0]) for name in NAMES], "train_loss")
    heights = sorted(text.get_position()[1] for text in axis.texts)
    gaps = [b - a for a, b in itertools.pairwise(heights)]
    assert len(heights) == len(NAMES)
    assert min(gaps) >= plots.LABEL_GAP - 1e-9
