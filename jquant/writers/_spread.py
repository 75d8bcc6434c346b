"""Rows of tensors spread over processes by what they cost."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from jquant.checkpoints import slab_rows
from jquant.core import Rows
from jquant.formats import FORMATS
from jquant.plan import Entry

# Per weight, relative to a copy. Measured on one core, in ns a weight: copies and casts 0.5 to 3, searches of
# scales 10 to 40, of codebooks 20 to 80.
COPIED, SEARCHED, CODEBOOK = 1, 20, 40

PARTS = 8  # in a share, at least: shares differ by no more than one of them


def cost(entry: Entry, rows: int) -> int:
    """What it takes to make so many rows of a tensor, in weights that are merely copied."""
    size = rows * entry.spec.cols
    if entry.type == entry.source_type or FORMATS[entry.type].block_size == 1:
        return COPIED * size
    return size * (CODEBOOK if FORMATS[entry.type].group_size > 1 else SEARCHED)


def portion(left: Sequence[Rows], entries: Mapping[str, Entry], shares: int, share: int) -> list[Rows]:
    """Of these rows, what one of so many shares makes: all shares together make all, at nearly the same cost.

    A tensor that would make one share larger than the others is divided, between slabs, so that a stack of
    experts or an embedding keeps no process waiting.
    """
    if shares == 1:
        return list(left)
    limit = sum(cost(entries[rows.name], rows.stop - rows.start) for rows in left) / (shares * PARTS)
    parts = [part for rows in left for part in _divided(rows, entries[rows.name], limit)]
    costs = [cost(entries[part.name], part.stop - part.start) for part in parts]
    return [parts[i] for i in spread(costs, shares)[share]]


def _divided(rows: Rows, entry: Entry, limit: float) -> list[Rows]:
    """Parts of whole slabs that do not cost more than the limit, where a slab does not."""
    slab = slab_rows(entry.spec.cols)
    step = max(int(limit // max(cost(entry, slab), 1)), 1) * slab
    return [Rows(rows.name, i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step)]


def spread(costs: Sequence[int], shares: int) -> list[list[int]]:
    """Indices of the costs in so many shares of nearly the same sum: the largest first, each to the least."""
    found: list[list[int]] = [[] for _ in range(shares)]
    least = [(0, share) for share in range(shares)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, share = heapq.heappop(least)
        found[share].append(index)
        heapq.heappush(least, (total + costs[index], share))
    return [sorted(share) for share in found]
