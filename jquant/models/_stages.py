"""The order in which data meets the matrices of a block."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from jquant.models._kinds import MIXER_IN, MIXER_OUT, MLP_IN, MLP_OUT, matrix


def stage(name: str) -> int:
    """Of a matrix, named within its block: those of one stage do not see each other's output.

    A name that no kind has, of an architecture without a forward pass, tells its place as GGUF's names do.
    """
    row = matrix(name)
    if row is not None:
        return row.stage
    if name.startswith("ffn"):
        return MLP_OUT if name.startswith("ffn_down") else MLP_IN
    return MIXER_OUT if name.startswith("attn_output") else MIXER_IN


def stages(names: Iterable[str]) -> list[list[str]]:
    """Matrices of a block in the order in which data meets them, those of one stage together."""
    return [list(same) for _, same in groupby(sorted(names, key=lambda n: (stage(n), n)), key=stage)]
