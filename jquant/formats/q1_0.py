"""Q1_0, 1.125 bits per weight: a sign per weight and one scale.

Block of 128 weights, 18 bytes:

    d   float16             bytes 0–1
    qs  uint8[16]           bytes 2–17, bit j of byte k is weight 8 k + j

w = d where the bit is set, else −d. For d > 0 the best bits are the signs of x, and then the best d is
Σ w |x| / Σ w: nothing has to be searched.
Source: ggml-common.h, block_q1_0; ggml-quants.c, dequantize_row_q1_0.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats._blocks import f16_bytes, f16_from_bytes, inverse, storable
from jquant.formats._grids import bit_fields, join_fields
from jquant.formats._levels import weights


def fit(blocks: Float[Array, "128 n"], importance: Float[Array, "128 n"] | None) -> Float[Array, " n"]:
    peak = jnp.max(jnp.abs(blocks), axis=0)
    x, w = jnp.abs(blocks) * inverse(peak)[None], weights(blocks, importance)
    return storable(jnp.sum(w * x, axis=0) * inverse(jnp.sum(w, axis=0)) * peak)


def assign(
    blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, d: Float[Array, " n"]
) -> Int[Array, "B n"]:
    return (blocks >= 0).astype(jnp.int32)


def reconstruct(codes: Int[Array, "B n"], d: Float[Array, " n"]) -> Float[Array, "B n"]:
    return jnp.where(codes != 0, d[None], -d[None])


def pack(codes: Int[Array, "128 n"], d: Float[Array, " n"]) -> UInt8[Array, "18 n"]:
    return jnp.concatenate([f16_bytes(d), join_fields(codes.astype(jnp.uint8), 1, 8)])


def unpack(data: UInt8[Array, "18 n"]) -> tuple[Int[Array, "128 n"], Float[Array, " n"]]:
    return bit_fields(data[2:], 1, 8).astype(jnp.int32), f16_from_bytes(data[:2])


Q1_0 = Format(
    name="Q1_0",
    ggml_type=41,
    block_size=128,
    block_bytes=18,
    fit=fit,
    assign=assign,
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
)
