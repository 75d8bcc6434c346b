"""IQ2_XXS, 2.0625 bits per weight: 256 codewords of 8 magnitudes, signs of even parity, a scale per 32.

Block of 256 weights, 66 bytes:

    d   float16             bytes 0–1
    qs  8 × 8 bytes         bytes 2–65, for each 32 weights: 4 grid indices, then a uint32
                            with four times 7 sign bits (low) and the 4-bit scale s (high)

w = d (½ + s) / 4 · grid[index] · (−1)^sign. The eighth sign of a group is the one that makes the number
of minuses even. Source: ggml-common.h, block_iq2_xxs; ggml-quants.c, dequantize_row_iq2_xxs.
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
Scales = tuple[Float[Array, " n"], Int[Array, "runs n"]]  # d, and s of each 32 weights

LAYOUT = _magnitudes.layout("IQ2_XXS", runs=8, unit=1 / 8, rms=(8.0, 45.0))


def reconstruct(codes: Codes, scales: Scales) -> Float[Array, "B n"]:
    """Every product is exact: d has 11 significant bits, 2 s + 1 has 5, a magnitude has 6."""
    index, signs = codes
    d, s = scales
    db = d[None] * (0.5 + s.astype(jnp.float32)) * 0.25
    return scaled(db, negate_where(signs, lookup("IQ2_XXS", index)))


def pack(codes: Codes, scales: Scales) -> UInt8[Array, "66 n"]:
    """Signs must have even parity: their eighth bit is not stored."""
    index, signs = codes
    d, s = scales
    n = d.shape[0]
    word = join_fields((signs & 127).astype(jnp.uint32), 7, 4) | s.astype(jnp.uint32) << 28
    halves = [index.astype(jnp.uint8).reshape(8, 4, n), words_to_bytes(word).reshape(8, 4, n)]
    return jnp.concatenate([f16_bytes(d), jnp.concatenate(halves, axis=1).reshape(64, n)])


def unpack(data: UInt8[Array, "66 n"]) -> tuple[Codes, Scales]:
    n = data.shape[1]
    halves = data[2:].reshape(8, 2, 4, n)
    word = words_from_bytes(halves[:, 1].reshape(32, n), jnp.uint32)  # [8, n]
    index = halves[:, 0].reshape(32, n).astype(jnp.int32)
    signs = even_signs(bit_fields(word, 7, 4).astype(jnp.uint8))
    return (index, signs), (f16_from_bytes(data[:2]), (word >> 28).astype(jnp.int32))


IQ2_XXS = Format(
    name="IQ2_XXS",
    ggml_type=16,
    block_size=256,
    block_bytes=66,
    group_size=8,
    fit=partial(_magnitudes.fit, layout=LAYOUT, even_signs=True),
    assign=partial(_magnitudes.assign, layout=LAYOUT, even_signs=True),
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
    needs_importance=True,
)
