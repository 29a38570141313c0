"""Train one of the paper's autoencoders: ``python -m benchmarks.train --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from benchmarks import data, optimizers, ranks
from benchmarks.data import faces
from benchmarks.optimizers import Settings
from benchmarks.progress import Display
from benchmarks.training import SCHEDULES, Config, Observer, train
from kbfgs_ext.bench.precision import PRECISIONS
from kbfgs_ext.optim.rules import STEP_LENGTHS

INTERRUPTED = 130  # exit status of a shell command ended by Ctrl-C
DIVERGED = 3


def parser() -> argparse.ArgumentParser:
    """The command line; whatever is left out of an optimizer's settings comes from its defaults."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="Train one of the paper's autoencoders and report losses against seconds.",
        epilog="exit status: 0 complete, 1 bad data or settings, 2 usage, 3 diverged, 130 Ctrl-C",
    )
    made.add_argument("--dataset", choices=data.NAMES, default="mnist")
    made.add_argument("--optimizer", choices=optimizers.NAMES, default="kbfgs")
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--max-seconds", type=float, help="stop after the epoch in which they pass")
    made.add_argument("--batch-size", type=int, default=1_000, help="images, default %(default)s")
    made.add_argument("--weight-decay", type=float, default=1e-5, help="default %(default)s")
    made.add_argument("--schedule", choices=SCHEDULES, default="constant", help="of lr")
    made.add_argument("--seed", type=int, default=0, help="of weights and batches")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the network")
    made.add_argument("--captured", action="store_true", help="steps as CUDA graphs")
    made.add_argument("--threads", type=int, help="CPU threads, default torch's choice")
    made.add_argument("--json", metavar="OUT", help="written after every epoch")
    made.add_argument("--quiet", action="store_true", help="print nothing but errors")

    source = made.add_argument_group("data")
    source.add_argument(
        "--data", metavar="DIR", help="folder with data files, default $KBFGS_DATA if set"
    )
    source.add_argument(
        "--download", action="store_true", help="fetch full MNIST into DIR or the user's cache"
    )
    source.add_argument(
        "--patches-per-image",
        type=int,
        default=faces.PATCHES_PER_IMAGE,
        help="size of the FACES-like set, default %(default)s as in the paper",
    )

    tuned = made.add_argument_group("optimizer settings")
    tuned.add_argument("--preset", choices=optimizers.PRESETS, help="of kbfgs and kbfgsl")
    tuned.add_argument("--lr", type=float, help="learning rate")
    tuned.add_argument("--momentum", type=float)
    quasi = made.add_argument_group("settings of kbfgs and kbfgsl (damping: of kfac too)")
    quasi.add_argument("--damping", type=float, help="its square root damps both sides")
    quasi.add_argument("--damping-a", type=float, help="damping of the activation side itself")
    quasi.add_argument("--damping-g", type=float, help="damping of the gradient side itself")
    quasi.add_argument("--pair-decay", type=float, help="of the averaged pair")
    quasi.add_argument(
        "--initial-scale", type=_scale, help="H_g starts as this times I, or from 'damping'"
    )
    quasi.add_argument("--step-length", choices=STEP_LENGTHS)
    quasi.add_argument("--hessian-action", choices=("ema", "minibatch"))
    quasi.add_argument("--memory", type=int, help="pairs kept by kbfgsl")
    quasi.add_argument("--backend", choices=("auto", "reference", "cpu", "cuda", "triton"))
    quasi.add_argument("--no-safeguard", dest="safeguard", action="store_false", default=None)
    quasi.add_argument(
        "--no-master-weights",
        dest="master_weights",
        action="store_false",
        default=None,
        help="round 16-bit parameters in every step",
    )
    quasi.add_argument(
        "--warm-start",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start the factors from all training batches",
    )
    return made


def _scale(text: str) -> float | str:
    return text if text == "damping" else float(text)


def config_of(arguments: argparse.Namespace) -> Config:
    """The run that the command line asks for."""
    return Config(
        dataset=arguments.dataset,
        optimizer=arguments.optimizer,
        settings=Settings(
            preset=arguments.preset,
            lr=arguments.lr,
            momentum=arguments.momentum,
            damping=arguments.damping,
            damping_a=arguments.damping_a,
            damping_g=arguments.damping_g,
            pair_decay=arguments.pair_decay,
            initial_scale=arguments.initial_scale,
            step_length=arguments.step_length,
            memory=arguments.memory,
            hessian_action=arguments.hessian_action,
            backend=arguments.backend,
            safeguard=arguments.safeguard,
            master_weights=arguments.master_weights,
        ),
        epochs=arguments.epochs,
        max_seconds=arguments.max_seconds,
        batch_size=arguments.batch_size,
        weight_decay=arguments.weight_decay,
        warm_start=arguments.warm_start,
        schedule=arguments.schedule,
        seed=arguments.seed,
        device=arguments.device,
        precision=arguments.precision,
        captured=arguments.captured,
        threads=arguments.threads,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = parser().parse_args(argv)
    with ranks.joined():
        arguments.quiet |= not ranks.leads()
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    console = Console()
    try:
        config = config_of(arguments)
        optimizers.settle(config.optimizer, config.settings)  # before data are loaded for nothing
        dataset = data.load(
            arguments.dataset,
            arguments.data,
            download=arguments.download,
            patches_per_image=arguments.patches_per_image,
        )
        if not arguments.quiet:
            console.print(dataset.summary, highlight=False, soft_wrap=True)
        observer = Observer() if arguments.quiet else Display(console)
        run = train(config, dataset, observer=observer, json_path=arguments.json)
    except (data.DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return DIVERGED if run.status == "diverged" else 0


if __name__ == "__main__":
    sys.exit(main())
