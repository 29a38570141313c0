"""Time of every kernel beside its alternatives: ``python -m kbfgs_ext.bench``.

Each case is first checked against the float64 reference: what is wrong gets no time. Providers take
turns, and every time stands beside its ratio to the eager reference of the same rounds. With
``--check`` our ratios are compared with a file's rows of the same kind of device instead, and with
``--compare`` two files with each other: of two commits, or of two machines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

try:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"{error}: pip install 'kbfgs_ext[bench]'") from error

from kbfgs_ext.bench import check, show, verdict
from kbfgs_ext.bench.cases import cases, is_ours
from kbfgs_ext.bench.clock import ceiling
from kbfgs_ext.bench.environment import environment
from kbfgs_ext.bench.measure import Bench, load, same_machine, store
from kbfgs_ext.bench.precision import PRECISIONS


def bench(args: argparse.Namespace, console: Console) -> int:
    """Measure and print; write rows where asked; 1 where a kernel of ours is wrong."""
    chosen = cases(args.full, args.kernel, args.shape, args.precision)
    measure = Bench(args.device, ceiling(args.device), args.seconds, args.full)
    console.print(
        f"{measure.environment['device']}, {measure.environment['threads']} threads: copies"
        f" {measure.ceiling.bytes_per_second / 1e9:.0f} GB/s, multiplies"
        f" {measure.ceiling.flops_per_second / 1e12:.2f} TFLOP/s"
    )
    wrong, made = False, []
    for case in track(chosen, "cases", console=Console(stderr=True)):
        rows = measure.rows(case)
        for row in rows:
            wrong |= is_ours(row["provider"]) and row.get("note", "").startswith("wrong")
            console.print(show.line(row), highlight=False, soft_wrap=True)
        if args.json:
            store(args.json, rows)
        made += rows
    console.print(show.table(made))
    if args.plot and show.headlines(made):
        show.plot(made, args.plot)
    return int(wrong)


def guard(args: argparse.Namespace, console: Console) -> int:
    """Compare with the rows of a file: 1 where a kernel has slowed, 2 without rows to compare."""
    here = environment(args.device)
    committed = check.speeds(
        row
        for row in load(args.check)
        if same_machine(row, here) and row["precision"] == args.precision
    )
    chosen = [
        case
        for case in cases(args.full, args.kernel, args.shape, args.precision)
        if any(key[:2] == case.key for key in committed)
    ]
    if not chosen:
        console.print(f"{args.check.name} has no rows from {here['device']}: `make bench` first")
        return 2
    measure = Bench(args.device, ceiling(args.device), args.seconds, args.full)
    named = []
    for case in track(chosen, "cases", console=Console(stderr=True)):
        named += check.slowed(case, committed, lambda x: measure.rows(x, is_ours))
    for found in named:
        console.print(str(found), highlight=False, soft_wrap=True)
    console.print(f"{len(chosen)} cases compared, {len(named)} kernels slower or wrong")
    return int(bool(named))


def compare(old: Path, new: Path, console: Console) -> int:
    """Print what has changed from one file to the other: 1 where a kernel has slowed, 2 where none
    is in both."""
    found = list(verdict.verdicts(load(old), load(new)))
    if not found:
        console.print(f"no kernel of ours has a time in {old} and in {new}")
        return 2
    made = Table("kernel", "shape", "provider", "cache", title=f"{old} to {new}")
    for head in ("old us", "new us", "new / old", "range"):
        made.add_column(head, justify="right")
    made.add_column("verdict")
    for one in found:
        times = f"{one.old_us:.1f}", f"{one.new_us:.1f}", f"{one.growth:.2f}"
        names = one.kernel, one.shape, one.provider, one.cache
        made.add_row(*names, *times, f"{one.low:.2f}-{one.high:.2f}", one.word)
    console.print(made)
    words = [one.word for one in found]
    counts = (f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    console.print(f"{len(found)} kernels: {', '.join(counts)}")
    return int(verdict.SLOWER in words)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kbfgs_ext.bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every layer, every square, compiled")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--shape", default="", help="only shapes whose name holds this")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a case (1)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="all but fp32 allow TF32 in float32 products; the 16-bit ones narrow activations,"
        " parameters and gradients",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    parser.add_argument("--json", type=Path, help="write the rows here, in place of older ones")
    parser.add_argument(
        "--plot", type=Path, help="draw ours beside the alternatives: png, svg, pdf"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare with the rows of a file"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="compare two files, run nothing",
    )
    args = parser.parse_args(arguments)
    console = Console(width=170)
    if args.compare:
        missing = [str(path) for path in args.compare if not path.exists()]
        if missing:
            parser.error(f"--compare: no such file: {', '.join(missing)}")
        old, new = args.compare
        return compare(old, new, console)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        return (guard if args.check else bench)(args, console)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(main())
