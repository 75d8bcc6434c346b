"""What is said of a model's function: by its header, and by the name of its architecture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jquant.core import Metadata, UserError


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an architecture's name says of its function and the header does not. The default is Qwen2's."""

    rotary_pairs: bool = False  # neighbouring rows of q and k are turned together, else halves of a head
    gelu: bool = False
    experts_normalized: bool = True
    embedding_scaled: bool = False  # by √width
    window: int | None = None  # where the header has none
    window_period: int = 0  # every so many blocks one attends to everything; 0: none does
    window_rotary_base: float | None = None  # of the blocks with a window, which are then not scaled
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    # Models of so many blocks divide q·k by √(width/heads) rather than √head_dim.
    blocks_scaled_by_width: int | None = None


@dataclass(frozen=True)
class Header:
    """Values of "ARCHITECTURE.key"; some are one for all blocks or one for each."""

    metadata: Metadata

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def integer(self, key: str, default: int | None = None, at: int = 0) -> int:
        return int(self._get(key, default, at))

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._get(key, default, 0))

    def text(self, key: str, default: str) -> str:
        return str(self.metadata.get(f"{self.architecture}.{key}", default))

    def _get(self, key: str, default: int | float | None, at: int) -> float:
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if isinstance(value, np.ndarray) and value.ndim:
            value = value[at] if at < len(value) else None
        if value is None or isinstance(value, str | list):
            raise UserError(f"the model's header has no usable {name} (found {value!r}); convert it again.")
        return float(value)
