"""IQ3_S, 3.4375 bits per weight: 512 codewords of 4 magnitudes, free signs, a scale per 32.

Block of 256 weights, 110 bytes:

    d       float16         bytes 0–1
    qs      uint8[64]       bytes 2–65, low 8 bits of the grid index of each 4 weights
    qh      uint8[8]        bytes 66–73, ninth bit of eight indices each, lowest first
    signs   uint8[32]       bytes 74–105, bit j for weight j of 8
    scales  uint8[4]        bytes 106–109, the 4-bit scales s of each 32 weights, low nibble first

w = d (1 + 2 s) · grid[index] · (−1)^sign.
Source: ggml-common.h, block_iq3_s; ggml-quants.c, dequantize_row_iq3_s.
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

Codes = tuple[Int[Array, "groups n"], UInt8[Array, "groups n"]]  # grid index and 4 sign bits of each group
Scales = tuple[Float[Array, " n"], Int[Array, "runs n"]]  # d, and s of each 32 weights

LAYOUT = _magnitudes.layout("IQ3_S", runs=8, unit=1.0, rms=(3.0, 12.0))


def reconstruct(codes: Codes, scales: Scales) -> Float[Array, "B n"]:
    """Every product is exact: d has 11 significant bits, 2 s + 1 has 5, a magnitude has 4."""
    index, signs = codes
    d, s = scales
    db = d[None] * (2 * s + 1).astype(jnp.float32)
    return scaled(db, negate_where(signs, lookup("IQ3_S", index)))


def pack(codes: Codes, scales: Scales) -> UInt8[Array, "110 n"]:
    index, signs = codes
    d, s = scales
    high = join_fields((index >> 8).astype(jnp.uint8), 1, 8)
    signs, s = join_fields(signs, 4, 2), join_fields(s.astype(jnp.uint8), 4, 2)
    return jnp.concatenate([f16_bytes(d), index.astype(jnp.uint8), high, signs, s])


def unpack(data: UInt8[Array, "110 n"]) -> tuple[Codes, Scales]:
    index = data[2:66].astype(jnp.int32) | bit_fields(data[66:74], 1, 8).astype(jnp.int32) << 8
    signs = bit_fields(data[74:106], 4, 2)
    s = bit_fields(data[106:], 4, 2).astype(jnp.int32)
    return (index, signs), (f16_from_bytes(data[:2]), s)


IQ3_S = Format(
    name="IQ3_S",
    ggml_type=21,
    block_size=256,
    block_bytes=110,
    group_size=4,
    fit=partial(_magnitudes.fit, layout=LAYOUT, even_signs=False),
    assign=partial(_magnitudes.assign, layout=LAYOUT, even_signs=False),
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
)
