"""Q2_0, 2.25 bits per weight: −1, 0, 1 or 2 times one scale.

Block of 64 weights, 18 bytes:

    d   float16             bytes 0–1
    qs  uint8[16]           bytes 2–17, bits 2 j, 2 j + 1 of byte k are weight 4 k + j

w = d (q − 1). d may be negative, so that the level without a mirror image serves the longer tail.
Source: ggml-common.h, block_q2_0; ggml-quants.c, dequantize_row_q2_0.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats._blocks import f16_bytes, f16_from_bytes
from jquant.formats._grids import bit_fields, join_fields
from jquant.formats._levels import fit_scale, nearest_code

LEVELS = (-1.0, 0.0, 1.0, 2.0)
# Scales to try, relative to the weight of largest magnitude.
_POSITIVE = np.geomspace(1 / 6, 1, 12)
LADDER = np.concatenate([_POSITIVE, -_POSITIVE])


def fit(blocks: Float[Array, "64 n"], importance: Float[Array, "64 n"] | None) -> Float[Array, " n"]:
    return fit_scale(blocks, importance, LEVELS, LADDER.tolist())


def assign(
    blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, d: Float[Array, " n"]
) -> Int[Array, "B n"]:
    return nearest_code(blocks, d[None], LEVELS)


def reconstruct(codes: Int[Array, "B n"], d: Float[Array, " n"]) -> Float[Array, "B n"]:
    """The product is exact: 11 significant bits times at most 2."""
    return d[None] * (codes - 1).astype(jnp.float32)


def pack(codes: Int[Array, "64 n"], d: Float[Array, " n"]) -> UInt8[Array, "18 n"]:
    return jnp.concatenate([f16_bytes(d), join_fields(codes.astype(jnp.uint8), 2, 4)])


def unpack(data: UInt8[Array, "18 n"]) -> tuple[Int[Array, "64 n"], Float[Array, " n"]]:
    return bit_fields(data[2:], 2, 4).astype(jnp.int32), f16_from_bytes(data[:2])


Q2_0 = Format(
    name="Q2_0",
    ggml_type=42,
    block_size=64,
    block_bytes=18,
    fit=fit,
    assign=assign,
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
)
