"""Tensors multiplied row by row and column by column as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float32, UInt8

from jquant.core import Source, TensorSpec
from jquant.transforms.smooth import Factors
from jquant.weights import Weights


@dataclass(frozen=True)
class ScaledSource:
    """The tensors of `source`; those with factors are decoded to float32 and multiplied.

    factors: by GGUF name without ".weight"; a tensor of one row has rows only.
    """

    source: Source
    factors: Mapping[str, Factors]

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {
            name: spec if self._factors(name) is None else replace(spec, type="F32")
            for name, spec in self.source.specs.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "rows bytes"]:
        factors = self._factors(name)
        if factors is None:
            return self.source.read(name, start, stop)
        x = Weights(self.source).rows(name, start, stop)
        return np.ascontiguousarray(self._times(name, factors, x, start)).view(np.uint8)

    def _factors(self, name: str) -> Factors | None:
        module, _, kind = name.rpartition(".")
        found = self.factors.get(module)
        return None if found is None or (kind == "bias" and found.rows is None) else found

    def _times(
        self, name: str, factors: Factors, x: Float32[np.ndarray, "rows cols"], start: int
    ) -> Float32[np.ndarray, "rows cols"]:
        """Rows of a tensor from `start`, of a stack's matrices one below the other."""
        shape = self.source.specs[name].shape
        rows = None if factors.rows is None else np.asarray(factors.rows, np.float32).reshape(-1)
        if name.endswith(".bias") or "norm" in name:
            assert rows is not None, f"{name} has no columns to multiply"
            return x * rows.reshape(len(x), -1)
        if rows is not None:
            x = x * rows[start : start + len(x), None]
        if factors.cols is None:
            return x
        cols = np.atleast_2d(np.asarray(factors.cols, np.float32))
        if len(cols) == 1:
            return x * cols
        rows_of_one = self.source.specs[name].rows // shape[0]
        return x * cols[np.arange(start, start + len(x)) // rows_of_one]
