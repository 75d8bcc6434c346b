"""Weights of a source as float32 arrays, whatever type they are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jquant.core import FLOAT_DTYPES, QuantizedTensor, Source, TensorSpec, UserError, dequantize
from jquant.formats import FORMATS


@dataclass(frozen=True)
class Weights:
    """What a model computes with: each tensor of `source`, decoded as a runtime decodes it."""

    source: Source

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self.source.specs

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor seen as a matrix: float32 [stop − start, cols].

        Raises UserError for a type that holds no weights.
        """
        spec = self.specs[name]
        data = self.source.read(name, start, stop)
        if spec.type in FLOAT_DTYPES:
            return data.view(FLOAT_DTYPES[spec.type]).astype(np.float32)
        if spec.type not in FORMATS:
            raise UserError(f"{name}: has type {spec.type}, which holds no weights; the model is damaged.")
        return np.asarray(dequantize(QuantizedTensor({"blocks": jnp.asarray(data)}, FORMATS[spec.type])))

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor, float32, of the shape that its spec says."""
        return self.rows(name).reshape(self.specs[name].shape)
