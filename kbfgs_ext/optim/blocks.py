"""Blocks: how a side of a layer is cut into the rows that share a factor."""

from __future__ import annotations

import itertools


def cut(n: int, block_size: int | None, unit: int = 1, beside: int = 0) -> list[slice]:
    """``n`` rows in as few blocks of at most ``block_size`` as there can be, of nearly equal size.

    Args:
        n: rows of the side.
        block_size: None makes one block.
        unit: rows that stay together (a channel under a kernel): no block is smaller.
        beside: rows at the end that stay with the unit before them (a bias).
    """
    units = max((n - beside) // unit, 1)
    count = 1 if block_size is None else min(-(-n // block_size), units)
    while True:
        ends = [k * n // count // unit * unit for k in range(count)] + [n]
        blocks = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
        largest = max(block.stop - block.start for block in blocks)
        if block_size is None or largest <= block_size or count == units:
            return blocks
        count += 1
