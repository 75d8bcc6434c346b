"""IQ1_M, 1.75 bits per weight: 2048 ternary codewords of 8, a shift per 8, a scale per 16.

Block of 256 weights, 56 bytes:

    qs      uint8[32]       bytes 0–31, low 8 bits of the grid index of each 8 weights
    qh      uint8[16]       bytes 32–47, a nibble for each 8 weights, low first: high 3 bits of the index,
                            then the bit that makes the shift negative
    scales  uint16[4]       bytes 48–55, in each: the 3-bit scales s of four times 16 weights (lowest
                            first), then 4 bits of d, a float16 (lowest first)

w = d (1 + 2 s) · (grid[index] ± ⅛), with IQ1_S's grid.
Source: ggml-common.h, block_iq1_m; ggml-quants.c, dequantize_row_iq1_m.
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

Codes = tuple[Int[Array, "groups n"], Int[Array, "groups n"]]  # grid index, and 1 where the shift is −⅛
Scales = tuple[Float[Array, " n"], Int[Array, "runs n"]]  # d, and s of each 16 weights

LAYOUT = _shifted.layout(runs=16)


def fit(blocks: Float[Array, "256 n"], importance: Float[Array, "256 n"] | None) -> Scales:
    """The shifts found on the way are not kept: `assign` takes the better one for the final scales."""
    d, s, _ = _shifted.fit(blocks, importance, LAYOUT, shared=1)
    return d, s


def assign(blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, scales: Scales) -> Codes:
    return _shifted.assign(blocks, importance, scales, LAYOUT)


def reconstruct(codes: Codes, scales: Scales) -> Float[Array, "B n"]:
    """The sum and every product are exact: d has 11 significant bits, 2 s + 1 and 8 (grid ± ⅛) have 4."""
    index, negative = codes
    d, s = scales
    n = d.shape[0]
    shift = jnp.where(negative == 0, SHIFT, -SHIFT)
    values = lookup("IQ1_M", index).reshape(len(shift), -1, n) + shift[:, None]
    return scaled(d[None] * (2 * s + 1).astype(jnp.float32), values.reshape(-1, n))


def pack(codes: Codes, scales: Scales) -> UInt8[Array, "56 n"]:
    index, negative = codes
    d, s = scales
    high = join_fields((index >> 8 | negative << 3).astype(jnp.uint8), 4, 2)
    quarters = bit_fields(words_from_bytes(f16_bytes(d), jnp.uint16), 4, 4)  # d by nibbles: [4, n]
    words = join_fields(s.astype(jnp.uint16), 3, 4) | quarters << 12
    return jnp.concatenate([index.astype(jnp.uint8), high, words_to_bytes(words)])


def unpack(data: UInt8[Array, "56 n"]) -> tuple[Codes, Scales]:
    high = bit_fields(data[32:48], 4, 2).astype(jnp.int32)  # [32, n]
    index = data[:32].astype(jnp.int32) | (high & 7) << 8
    words = words_from_bytes(data[48:], jnp.uint16)  # [4, n]
    d = f16_from_bytes(words_to_bytes(join_fields(words >> 12, 4, 4)))
    return (index, high >> 3), (d, bit_fields(words, 3, 4).astype(jnp.int32))


IQ1_M = Format(
    name="IQ1_M",
    ggml_type=29,
    block_size=256,
    block_bytes=56,
    group_size=8,
    fit=fit,
    assign=assign,
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
    needs_importance=True,
)
