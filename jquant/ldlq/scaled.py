"""Error feedback around a ScaledFormat: its groups, or whole rows, are blocks with the scale among the bytes.

`ldlq` knows formats by blocks. A ScaledFormat is one of these, 8 bits a code and 4 bytes a scale; what comes
out is taken apart again into codes and scales.
"""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import PyTree, UInt8

from jquant.core import FLOAT_DTYPES, Format, QuantizedTensor, ScaledFormat

SCALE_BYTES = 4


def by_groups(format: ScaledFormat, cols: int) -> Format:
    """The format whose blocks are the groups, or rows of so many columns: codes of 8 bits, then the scale,
    and the zero, as float32."""
    return _by_blocks(format, format.group_size or cols)


@cache
def _by_blocks(format: ScaledFormat, size: int) -> Format:
    return Format(
        name=format.name,
        ggml_type=None,
        block_size=size,
        block_bytes=size + SCALE_BYTES * len(format.scale_parts),
        fit=partial(_fit, format),
        assign=partial(_assign, format),
        reconstruct=partial(_reconstruct, format),
        pack=_pack,
        unpack=partial(_unpack, format),
    )


def _fit(format: ScaledFormat, blocks: Array, importance: Array | None = None) -> PyTree:
    scales = format.fit(blocks.T, None if importance is None else importance.T)
    dtype = FLOAT_DTYPES[format.scale_type]
    return jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), scales)


def _assign(format: ScaledFormat, blocks: Array, importance: Array | None, scales: PyTree) -> Array:
    return format.assign(blocks.T, scales).T


def _reconstruct(format: ScaledFormat, codes: Array, scales: PyTree) -> Array:
    return format.reconstruct(codes.T, scales).T


def _pack(codes: Array, scales: PyTree) -> Array:
    bytes_ = [lax.bitcast_convert_type(a, jnp.uint8).T for a in jax.tree.leaves(scales)]
    return jnp.concatenate([lax.bitcast_convert_type(codes, jnp.uint8), *bytes_])


def _unpack(format: ScaledFormat, data: Array) -> tuple[Array, PyTree]:
    start = len(data) - SCALE_BYTES * len(format.scale_parts)
    codes, *scales = jnp.split(data, list(range(start, len(data), SCALE_BYTES)))
    found = tuple(lax.bitcast_convert_type(a.T, jnp.float32) for a in scales)
    dtype = jnp.float8_e4m3fn if format.type == "F8_E4M3" else jnp.int8
    return lax.bitcast_convert_type(codes, dtype), found if format.zeros else found[0]


def taken_apart(data: UInt8[Array, "rows bytes"], format: ScaledFormat, blocked: Format) -> QuantizedTensor:
    """What was coded in `blocked`, the format by its groups, as codes and scales."""
    rows = data.shape[0]
    codes, scales = _unpack(format, data.reshape(-1, blocked.block_bytes).T)
    dtype = FLOAT_DTYPES[format.scale_type]
    stored = [a.reshape(rows, -1).astype(dtype) for a in jax.tree.leaves(scales)]
    by_name = zip(format.scale_parts, stored, strict=True)
    return QuantizedTensor({format.part: format.pack(codes.T.reshape(rows, -1)), **dict(by_name)}, format)
