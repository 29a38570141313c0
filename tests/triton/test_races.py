"""A scalar in memory that every warp reads and one thread writes: a barrier must lie between.

Triton lets all warps load a scalar and one thread store it. Where a loaded scalar steers anything
but its own new value, a warp that comes late would read what the first has already written. Read
off the compiler's intermediate code of every launch.
"""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

from tests.triton import test_compiled  # noqa: E402

LOAD = re.compile(r"(%\S+) = tt\.load (%[\w#]+).* : !tt\.ptr<")
STORE = re.compile(r"tt\.store (%[\w#]+), .* : !tt\.ptr<")
MADE = re.compile(r"\s*%[^=]* = ")
VALUE = re.compile(r"%[\w#]+")


def steered(lines: list[str], start: int) -> list[int]:
    """The lines that do something with what line ``start`` loads: accesses, branches, loops."""
    tainted, found = {VALUE.search(lines[start])[0]}, []
    for at, line in enumerate(lines[start + 1 :], start + 1):
        made = MADE.match(line)
        if not tainted & set(VALUE.findall(line[made.end() :] if made else line)):
            continue
        if re.search(r"tt\.(load|store|reduce)|scf\.|cf\.", line):
            found.append(at)
        if made:
            tainted |= set(VALUE.findall(made[0]))
    return found


def races(code: str) -> list[str]:
    lines = code.splitlines()
    stores = {at: found[1] for at, line in enumerate(lines) if (found := STORE.search(line))}
    barriers = [at for at, line in enumerate(lines) if re.search(r"\bbarrier\b", line)]
    return [
        f"{lines[load].strip()} ... {lines[store].strip()}"
        for load, line in enumerate(lines)
        if (loaded := LOAD.search(line))
        for store, place in stores.items()
        if load < store and place == loaded[2] and steered(lines, load) != [store]
        if not any(load < barrier < store for barrier in barriers)
    ]


def test_no_warp_reads_a_scalar_that_another_has_written():
    found = {
        f"{what}, {launch.kernel.__name__}": race
        for what, launch in test_compiled.launches(torch.float32)
        if launch.options.get("num_warps", 4) > 1
        if (race := races(test_compiled.compiled(launch, 90).asm["ttir"]))
    }
    assert not found
