"""What a file is to be: of a size, or of a distance from the original."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of these. Raises ValueError for none or several, and for what is no number above 0."""

    nbytes: int | None = None  # of the file, or of all its shards
    bpw: int | float | None = None  # of all tensors, without header
    kld: int | float | None = None  # KL divergence from the original, nats a token

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of nbytes=, bpw= and kld=; got {', '.join(given) or 'none'}.")
        for name, value in given.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}=: expected a number above 0; got {value}.")
            if name != "nbytes":
                object.__setattr__(self, name, float(value))  # 6 and 6.0 are one target

    def __str__(self) -> str:
        if self.nbytes is not None:
            return f"{self.nbytes} bytes"
        return f"{self.bpw} bpw" if self.bpw is not None else f"KL divergence {self.kld}"
