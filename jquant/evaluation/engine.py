"""What the engines have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

Progress = Callable[[float], None]  # share of a call's work that is done


@runtime_checkable
class Engine(Protocol):
    """A model, opened to be run. `bos` is the token before every text, None where the model wants none."""

    vocab: int
    bos: int | None

    @property
    def facts(self) -> dict[str, object]:
        """What the logits depend on beside the model and the tokens: name, version, device; JSON values."""
        ...

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids; the texts of special tokens stay text."""
        ...

    def logits(
        self,
        sequences: Sequence[Int32[np.ndarray, " _"]],
        first: Sequence[int],
        progress: Progress = lambda share: None,
    ) -> Iterator[Float32[np.ndarray, "_ vocab"]]:
        """Of each sequence, what is predicted behind its positions first … length − 2, so that row i is of
        the token at first + 1 + i. Each sequence is a text of its own."""
        ...

    def close(self) -> None: ...
