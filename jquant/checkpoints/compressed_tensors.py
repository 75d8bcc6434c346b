"""A checkpoint of codes and scales as the float32 weights that they stand for: a Source over a Source.

Of a folder with static scales of inputs X.input_scale is apart: `input_scale`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jquant.core import (
    FLOAT_DTYPES,
    TRAINED,
    QuantizedTensor,
    ScaledFormat,
    Source,
    TensorSpec,
    UserError,
    dequantize,
)

DTYPES = FLOAT_DTYPES | {"I8": np.dtype(np.int8), "I32": np.dtype(np.int32)}
_SCALE, _SHAPE, _INPUT = "weight_scale", "weight_shape", "input_scale"


class Decompressed:
    """`source` with X.weight, float32, in place of X.weight or X.weight_packed and X.weight_scale."""

    def __init__(self, source: Source, format: ScaledFormat) -> None:
        """Raises UserError where codes lack their scales, or the two do not fit."""
        self._source, self._format = source, format
        self._formats: dict[str, ScaledFormat] = {}
        self._specs: dict[str, TensorSpec] = {}
        scaled = {name.removesuffix(f".{_SCALE}") for name in source.specs if name.endswith(f".{_SCALE}")}
        for name, spec in source.specs.items():
            module, _, part = name.rpartition(".")
            if module in scaled and part == format.part:
                weight = self._decoded(module, spec)
                self._specs[weight.name] = weight
            elif module not in scaled or part not in (_SCALE, _SHAPE, _INPUT):
                self._specs[name] = spec

    def _decoded(self, module: str, spec: TensorSpec) -> TensorSpec:
        scale = self._source.specs[f"{module}.{_SCALE}"]
        shape = (*spec.shape[:-1], spec.cols * self._format.per_code)
        wanted = (*spec.shape[:-1], self._format.groups(shape[-1]))
        if spec.type != self._format.type or scale.type not in TRAINED or scale.shape != wanted:
            raise UserError(
                f"{spec.name}: {spec.type} {spec.shape} with scales {scale.type} {scale.shape} is not what "
                f"config.json declares ({self._format}, scales {wanted}); the folder is damaged."
            )
        name = f"{module}.weight"
        self._formats[name] = replace(self._format, scale_type=scale.type)
        return TensorSpec(name, shape, "F32")

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return MappingProxyType(self._specs)

    @property
    def decoded(self) -> Collection[str]:
        """Names of the weights that are stored as codes."""
        return self._formats.keys()

    def input_scale(self, name: str) -> np.float32:
        """That of the inputs of a decoded weight. Raises UserError where it has none, or none above 0."""
        stored = f"{name.removesuffix('.weight')}.{_INPUT}"
        spec = self._source.specs.get(stored)
        if spec is None or spec.size != 1 or spec.type not in TRAINED:
            raise UserError(
                f"{stored}: config.json declares one number, which is not there; use the original."
            )
        scale = np.float32(self._rows(stored, 0, 1).item())
        if not 0 < scale < np.inf:
            raise UserError(f"{stored}: is {scale}; the folder is damaged.")
        return scale

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "k b"]:
        if name not in self._formats:
            return self._source.read(name, start, stop)
        format, module = self._formats[name], name.removesuffix(".weight")
        parts = {
            part: jnp.asarray(self._rows(f"{module}.{part}", start, stop)) for part in (format.part, _SCALE)
        }
        return np.asarray(dequantize(QuantizedTensor(parts, format))).view(np.uint8)

    def _rows(self, name: str, start: int, stop: int | None) -> np.ndarray:
        return self._source.read(name, start, stop).view(DTYPES[self._source.specs[name].type])
