"""IQ3_XXS, 3.0625 bits per weight: 256 codewords of 4 magnitudes, signs of even parity, a scale per 32.

Block of 256 weights, 98 bytes:

    d    float16            bytes 0–1
    qs   uint8[64]          bytes 2–65, the grid index of each 4 weights
    sas  uint32[8]          bytes 66–97, for each 32 weights: four times 7 sign bits (low) and the 4-bit
                            scale s (high)

w = d (½ + s) / 2 · grid[index] · (−1)^sign. The parity of the signs ties 8 weights together, so a code is
a pair of indices with its 8 signs. Source: ggml-common.h, block_iq3_xxs; ggml-quants.c,
dequantize_row_iq3_xxs.
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

Codes = tuple[Int[Array, "groups 2 n"], UInt8[Array, "groups n"]]  # two grid indices and 8 sign bits
Scales = tuple[Float[Array, " n"], Int[Array, "runs n"]]  # d, and s of each 32 weights

LAYOUT = _magnitudes.layout("IQ3_XXS", runs=8, unit=1 / 4, rms=(12.0, 50.0))


def assign(blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, scales: Scales) -> Codes:
    index, signs = _magnitudes.assign(blocks, importance, scales, LAYOUT, even_signs=True)
    return index.reshape(len(signs), 2, -1), signs


def reconstruct(codes: Codes, scales: Scales) -> Float[Array, "B n"]:
    """Every product is exact: d has 11 significant bits, 2 s + 1 has 5, a magnitude has 5."""
    index, signs = codes
    d, s = scales
    db = d[None] * (0.5 + s.astype(jnp.float32)) * 0.5
    return scaled(db, negate_where(signs, lookup("IQ3_XXS", index)))


def pack(codes: Codes, scales: Scales) -> UInt8[Array, "98 n"]:
    """Signs must have even parity: their eighth bit is not stored."""
    index, signs = codes
    d, s = scales
    word = join_fields((signs & 127).astype(jnp.uint32), 7, 4) | s.astype(jnp.uint32) << 28
    qs = index.astype(jnp.uint8).reshape(64, -1)
    return jnp.concatenate([f16_bytes(d), qs, words_to_bytes(word)])


def unpack(data: UInt8[Array, "98 n"]) -> tuple[Codes, Scales]:
    word = words_from_bytes(data[66:], jnp.uint32)  # [8, n]
    index = data[2:66].astype(jnp.int32).reshape(32, 2, -1)
    signs = even_signs(bit_fields(word, 7, 4).astype(jnp.uint8))
    return (index, signs), (f16_from_bytes(data[:2]), (word >> 28).astype(jnp.int32))


IQ3_XXS = Format(
    name="IQ3_XXS",
    ggml_type=18,
    block_size=256,
    block_bytes=98,
    group_size=8,
    fit=partial(_magnitudes.fit, layout=LAYOUT, even_signs=True),
    assign=assign,
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
    needs_importance=True,
)
