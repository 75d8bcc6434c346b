"""The order in which data meets the matrices of a block."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


def stage(name: str) -> int:
    """Of a matrix, named within its block: those of one stage do not see each other's output."""
    if name.startswith("attn"):
        return int(name == "attn_output")
    return 2 + int(name.startswith("ffn_down"))


def stages(names: Iterable[str]) -> list[list[str]]:
    """Matrices of a block in the order in which data meets them, those of one stage together."""
    return [list(same) for _, same in groupby(sorted(names, key=lambda n: (stage(n), n)), key=stage)]
