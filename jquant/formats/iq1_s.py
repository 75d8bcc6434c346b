"""IQ1_S, 1.5625 bits per weight: 2048 ternary codewords of 8, a scale and a shift per 32.

Block of 256 weights, 50 bytes:

    d   float16             bytes 0–1
    qs  uint8[32]           bytes 2–33, low 8 bits of the grid index of each 8 weights
    qh  uint16[8]           bytes 34–49, for each 32 weights: high 3 bits of four indices (lowest first),
                            the 3-bit scale s, and the bit that makes the shift negative

w = d (1 + 2 s) · (grid[index] ± ⅛), with grid values −1, 0, 1.
Source: ggml-common.h, block_iq1_s; ggml-quants.c, dequantize_row_iq1_s.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats import _shifted
from jquant.formats._blocks import f16_bytes, f16_from_bytes
from jquant.formats._grids import bit_fields, join_fields, lookup, scaled, words_from_bytes, words_to_bytes
from jquant.formats._shifted import SHIFT

Codes = Int[Array, "groups n"]  # grid index of each group
# d; s of each 32 weights; and 1 where their shift is −⅛. The shift spans four groups, so it is a scale.
Scales = tuple[Float[Array, " n"], Int[Array, "runs n"], Int[Array, "runs n"]]

LAYOUT = _shifted.layout(runs=8)


def fit(blocks: Float[Array, "256 n"], importance: Float[Array, "256 n"] | None) -> Scales:
    return _shifted.fit(blocks, importance, LAYOUT, shared=4)


def assign(blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, scales: Scales) -> Codes:
    d, s, negative = scales
    return _shifted.assign(blocks, importance, (d, s), LAYOUT, negative)[0]


def reconstruct(codes: Codes, scales: Scales) -> Float[Array, "B n"]:
    """The sum and every product are exact: d has 11 significant bits, 2 s + 1 and 8 (grid ± ⅛) have 4."""
    d, s, negative = scales
    n = d.shape[0]
    shift = jnp.where(negative == 0, SHIFT, -SHIFT)
    values = lookup("IQ1_S", codes).reshape(len(shift), -1, n) + shift[:, None]
    return scaled(d[None] * (2 * s + 1).astype(jnp.float32), values.reshape(-1, n))


def pack(codes: Codes, scales: Scales) -> UInt8[Array, "50 n"]:
    d, s, negative = scales
    high = join_fields(codes.astype(jnp.uint16) >> 8, 3, 4)
    high = high | s.astype(jnp.uint16) << 12 | negative.astype(jnp.uint16) << 15
    return jnp.concatenate([f16_bytes(d), codes.astype(jnp.uint8), words_to_bytes(high)])


def unpack(data: UInt8[Array, "50 n"]) -> tuple[Codes, Scales]:
    high = words_from_bytes(data[34:], jnp.uint16)  # [8, n]
    index = data[2:34].astype(jnp.int32) | bit_fields(high, 3, 4).astype(jnp.int32) << 8
    s, negative = (high >> 12 & 7).astype(jnp.int32), (high >> 15).astype(jnp.int32)
    return index, (f16_from_bytes(data[:2]), s, negative)


IQ1_S = Format(
    name="IQ1_S",
    ggml_type=19,
    block_size=256,
    block_bytes=50,
    group_size=8,
    fit=fit,
    assign=assign,
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
    needs_importance=True,
)
