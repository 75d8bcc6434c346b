"""Work spread over processes by what it costs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from jquant.formats import FORMATS
from jquant.plan import Entry

# Per weight, relative to a copy. Measured on one core, in ns a weight: copies and casts 0.5 to 3, searches of
# scales 10 to 40, of codebooks 20 to 80.
COPIED, SEARCHED, CODEBOOK = 1, 20, 40


def cost(entry: Entry) -> int:
    """What it takes to make a tensor, in weights that are merely copied."""
    format = FORMATS[entry.type]
    if entry.type == entry.source_type or format.block_size == 1:
        return COPIED * entry.size
    return entry.size * (CODEBOOK if format.group_size > 1 else SEARCHED)


def spread(costs: Sequence[int], shares: int) -> list[list[int]]:
    """Indices of the costs in so many shares of nearly the same sum: the largest first, each to the least."""
    found: list[list[int]] = [[] for _ in range(shares)]
    least = [(0, share) for share in range(shares)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, share = heapq.heappop(least)
        found[share].append(index)
        heapq.heappush(least, (total + costs[index], share))
    return [sorted(share) for share in found]
