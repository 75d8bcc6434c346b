"""Representatives of a table: the rows that every run tests. The others bear the mark `every`."""

from __future__ import annotations

from collections.abc import Container, Iterable

import pytest

# One format of each kind of search.
FORMATS = {"Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ2_XXS", "IQ1_S", "TQ1_0", "MXFP4"}

# One architecture of each kind of block.
ARCHITECTURES = {"LlamaForCausalLM", "Phi3ForCausalLM", "Gemma2ForCausalLM", "Qwen2MoeForCausalLM"}


def rows(names: Iterable[str], quick: Container[str] = FORMATS) -> list:
    """The table's names as parameters."""
    return [pytest.param(name, id=name, marks=() if name in quick else pytest.mark.every) for name in names]
