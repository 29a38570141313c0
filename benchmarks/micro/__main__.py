"""Time of every kernel beside its alternatives: ``python -m benchmarks.micro``.

Each case is first checked against the float64 reference: what is wrong gets no time. Providers take
turns, and every time stands beside its ratio to the eager reference of the same rounds. With
``--check`` our ratios are compared with the committed rows of the same kind of device instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.environment import environment
from benchmarks.micro import check
from benchmarks.micro.cases import cases, is_ours
from benchmarks.micro.clock import ceiling
from benchmarks.micro.measure import Bench, Row, load, same_machine, store
from benchmarks.precision import PRECISIONS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "micro.jsonl"


def line(row: Row) -> str:
    """A row for people."""
    cache = {"cold": ", cold", "warm": ", warm"}.get(row["cache"], "")
    name = f"{row['kernel']:28} {row['shape']:16} {row['provider'] + cache:24}"
    if row["us"] is None:
        return f"{name} {row['note']}"
    us = row["us"]
    rate = (
        f"{row['gb_per_s']:7.1f} GB/s   "
        if row["bound"] == "memory"
        else f"{row['tflop_per_s']:7.3f} TFLOP/s"
    )
    return (
        f"{name} {us['q50']:10.1f} us ({us['q20']:.1f}-{us['q80']:.1f})"
        f"  {row['ratio_to_eager']:6.3f} of eager  {rate} {row['share_of_ceiling']:6.1%}"
        f"  +{row['peak_bytes'] / 2**20:.1f} MiB"
    )


def bench(args: argparse.Namespace, console: Console) -> int:
    """Measure and print; write rows where asked; 1 where a kernel of ours is wrong."""
    chosen = cases(args.full, args.kernel, args.shape, args.precision)
    measure = Bench(args.device, ceiling(args.device), args.seconds, args.full)
    console.print(
        f"{measure.environment['device']}, {measure.environment['threads']} threads: copies"
        f" {measure.ceiling.bytes_per_second / 1e9:.0f} GB/s, multiplies"
        f" {measure.ceiling.flops_per_second / 1e12:.2f} TFLOP/s"
    )
    wrong = False
    for case in track(chosen, "cases", console=Console(stderr=True)):
        rows = measure.rows(case)
        for row in rows:
            wrong |= is_ours(row["provider"]) and row.get("note", "").startswith("wrong")
            console.print(line(row), highlight=False, soft_wrap=True)
        if args.json:
            store(args.json, rows)
    return int(wrong)


def compare(args: argparse.Namespace, console: Console) -> int:
    """Compare with the committed rows: 1 where a kernel has slowed, 2 without rows to compare."""
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


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description=__doc__)
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
        "--check", type=Path, nargs="?", const=RESULTS, help="compare with the rows of this file"
    )
    args = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        return (compare if args.check else bench)(args, Console(width=170))
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(main())
