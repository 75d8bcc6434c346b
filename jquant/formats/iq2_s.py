"""IQ2_S, 2.5625 bits per weight: 1024 codewords of 8 magnitudes, free signs, a scale per 16.

Block of 256 weights, 82 bytes:

    d       float16         bytes 0–1
    qs      uint8[32]       bytes 2–33, low 8 bits of the grid index of each 8 weights
    signs   uint8[32]       bytes 34–65, bit j for weight j of the group
    qh      uint8[8]        bytes 66–73, high 2 bits of four indices each, lowest first
    scales  uint8[8]        bytes 74–81, the 4-bit scales s of each 16 weights, low nibble first

w = d (½ + s) / 4 · grid[index] · (−1)^sign.
Source: ggml-common.h, block_iq2_s; ggml-quants.c, dequantize_row_iq2_s.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats import _magnitudes
from jquant.formats._blocks import f16_bytes, f16_from_bytes
from jquant.formats._grids import bit_fields, join_fields, lookup, negate_where, scaled

Codes = tuple[Int[Array, "groups n"], UInt8[Array, "groups n"]]  # grid index and 8 sign bits of each group
Scales = tuple[Float[Array, " n"], Int[Array, "runs n"]]  # d, and s of each 16 weights

LAYOUT = _magnitudes.layout("IQ2_S", runs=16, unit=1 / 8, rms=(8.0, 45.0))


def reconstruct(codes: Codes, scales: Scales) -> Float[Array, "B n"]:
    """Every product is exact: d has 11 significant bits, 2 s + 1 has 5, a magnitude has 6."""
    index, signs = codes
    d, s = scales
    db = d[None] * (0.5 + s.astype(jnp.float32)) * 0.25
    return scaled(db, negate_where(signs, lookup("IQ2_S", index)))


def pack(codes: Codes, scales: Scales) -> UInt8[Array, "82 n"]:
    index, signs = codes
    d, s = scales
    high = join_fields((index >> 8).astype(jnp.uint8), 2, 4)
    low = index.astype(jnp.uint8)
    return jnp.concatenate([f16_bytes(d), low, signs, high, join_fields(s.astype(jnp.uint8), 4, 2)])


def unpack(data: UInt8[Array, "82 n"]) -> tuple[Codes, Scales]:
    index = data[2:34].astype(jnp.int32) | bit_fields(data[66:74], 2, 4).astype(jnp.int32) << 8
    s = bit_fields(data[74:], 4, 2).astype(jnp.int32)
    return (index, data[34:66]), (f16_from_bytes(data[:2]), s)


IQ2_S = Format(
    name="IQ2_S",
    ggml_type=22,
    block_size=256,
    block_bytes=82,
    group_size=8,
    fit=partial(_magnitudes.fit, layout=LAYOUT, even_signs=False),
    assign=partial(_magnitudes.assign, layout=LAYOUT, even_signs=False),
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
    needs_importance=True,
)
