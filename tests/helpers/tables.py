"""Representatives of a table: the rows that every run tests. The others bear the mark `every`."""

from __future__ import annotations

from collections.abc import Container, Iterable

import pytest

from jquant import formats as known

# One format of each kind of search.
FORMATS = {"Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ2_XXS", "IQ1_S", "TQ1_0", "MXFP4"}

# One architecture of each kind of block.
ARCHITECTURES = {"LlamaForCausalLM", "Phi3ForCausalLM", "Gemma2ForCausalLM", "Qwen2MoeForCausalLM"}


def rows(names: Iterable, quick: Container = FORMATS) -> list:
    """The table's names, or numbers, as parameters."""
    return [
        pytest.param(name, id=str(name), marks=() if name in quick else pytest.mark.every) for name in names
    ]


def formats(names: Iterable[str], quick: Container[str] = FORMATS) -> list:
    """The formats of these names as parameters."""
    return [pytest.param(known.FORMATS[row.id], id=row.id, marks=row.marks) for row in rows(names, quick)]
