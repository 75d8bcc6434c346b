"""Tensors multiplied row by row and column by column as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float32, UInt8

from jquant.checkpoints.weights import Weights
from jquant.core import Source, TensorSpec


class RowFactors(NamedTuple):
    """What some rows of a stored tensor are multiplied by."""

    rows: np.ndarray | None  # float32 [rows], or of a vector each element
    cols: np.ndarray | None  # [cols], or [matrices, cols] of a stack
    vector: bool
    shift: float = 0.0  # what the model adds to the tensor before it multiplies with it
    matrix_rows: int = 0  # of each matrix of a stack with factors of its own

    def times(self, x: Float32[np.ndarray, "rows cols"], start: int) -> Float32[np.ndarray, "rows cols"]:
        """Rows of the tensor from `start`, of a stack's matrices one below the other; a vector is one row."""
        x = x + np.float32(self.shift)
        if self.rows is not None:
            x = x * (self.rows[None] if self.vector else self.rows[start : start + len(x), None])
        if self.cols is not None:
            matrix = 0 if self.cols.ndim == 1 else np.arange(start, start + len(x)) // self.matrix_rows
            x = x * np.atleast_2d(self.cols)[matrix]
        return x - np.float32(self.shift)


def factors_for(name: str, factors: Mapping[str, Factors]) -> Factors | None:
    """Those of a tensor, None where it stays. factors: by GGUF name without ".weight"; a bias has rows."""
    module, _, kind = name.rpartition(".")
    given = factors.get(module)
    if given is None or kind != "bias":
        return given
    return None if given.rows is None else given._replace(cols=None)


@dataclass(frozen=True)
class ScaledSource:
    """The tensors of `source`; those that `factors_for` finds are decoded to float32 and multiplied."""

    source: Source
    factors: Mapping[str, Factors]

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {
            name: spec if factors_for(name, self.factors) is None else replace(spec, type="F32")
            for name, spec in self.source.specs.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "rows bytes"]:
        given = factors_for(name, self.factors)
        if given is None:
            return self.source.read(name, start, stop)
        spec = self.source.specs[name]
        rows, cols = (None if a is None else np.asarray(a, np.float32) for a in given)
        made = RowFactors(
            None if rows is None else rows.reshape(-1),
            cols,
            vector=len(spec.shape) == 1,
            matrix_rows=spec.rows // spec.shape[0],
        )
        x = made.times(Weights(self.source).rows(name, start, stop), start)
        return np.ascontiguousarray(x).view(np.uint8)


class Factors(NamedTuple):
    """What a tensor is multiplied by."""

    rows: Array | None = None  # [*stack, rows], or of a vector each element
    cols: Array | None = None  # [*stack, cols], or [cols] for all matrices of a stack
