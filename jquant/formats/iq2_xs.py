"""IQ2_XS, 2.3125 bits per weight: 512 codewords of 8 magnitudes, signs of even parity, a scale per 16.

Block of 256 weights, 74 bytes:

    d       float16         bytes 0–1
    qs      uint16[32]      bytes 2–65, for each 8 weights: grid index (9 bits), then 7 signs
    scales  uint8[8]        bytes 66–73, the 4-bit scales s of each 16 weights, low nibble first

w = d (½ + s) / 4 · grid[index] · (−1)^sign. The eighth sign of a group is the one that makes the number
of minuses even. Source: ggml-common.h, block_iq2_xs; ggml-quants.c, dequantize_row_iq2_xs.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats import _magnitudes
from jquant.formats._blocks import f16_bytes, f16_from_bytes
from jquant.formats._grids import (
    bit_fields,
    even_signs,
    join_fields,
    lookup,
    negate_where,
    scaled,
    words_from_bytes,
    words_to_bytes,
)

Codes = tuple[Int[Array, "groups n"], UInt8[Array, "groups n"]]  # grid index and 8 sign bits of each group
Scales = tuple[Float[Array, " n"], Int[Array, "runs n"]]  # d, and s of each 16 weights

LAYOUT = _magnitudes.layout("IQ2_XS", runs=16, unit=1 / 8, rms=(8.0, 45.0))


def reconstruct(codes: Codes, scales: Scales) -> Float[Array, "B n"]:
    """Every product is exact: d has 11 significant bits, 2 s + 1 has 5, a magnitude has 6."""
    index, signs = codes
    d, s = scales
    db = d[None] * (0.5 + s.astype(jnp.float32)) * 0.25
    return scaled(db, negate_where(signs, lookup("IQ2_XS", index)))


def pack(codes: Codes, scales: Scales) -> UInt8[Array, "74 n"]:
    """Signs must have even parity: their eighth bit is not stored."""
    index, signs = codes
    d, s = scales
    qs = index.astype(jnp.uint16) | (signs & 127).astype(jnp.uint16) << 9
    return jnp.concatenate([f16_bytes(d), words_to_bytes(qs), join_fields(s.astype(jnp.uint8), 4, 2)])


def unpack(data: UInt8[Array, "74 n"]) -> tuple[Codes, Scales]:
    qs = words_from_bytes(data[2:66], jnp.uint16)
    signs = even_signs((qs >> 9).astype(jnp.uint8))
    s = bit_fields(data[66:], 4, 2).astype(jnp.int32)
    return ((qs & 511).astype(jnp.int32), signs), (f16_from_bytes(data[:2]), s)


IQ2_XS = Format(
    name="IQ2_XS",
    ggml_type=17,
    block_size=256,
    block_bytes=74,
    group_size=8,
    fit=partial(_magnitudes.fit, layout=LAYOUT, even_signs=True),
    assign=partial(_magnitudes.assign, layout=LAYOUT, even_signs=True),
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
    needs_importance=True,
)
