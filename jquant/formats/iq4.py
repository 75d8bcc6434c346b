"""IQ4_NL and IQ4_XS, 4.5 and 4.25 bits per weight: 4-bit codes for 16 unevenly spaced levels.

IQ4_NL, block of 32 weights, 18 bytes:

    d   float16             bytes 0–1
    qs  uint8[16]           bytes 2–17, weight j in the low nibble of byte j, weight 16 + j in the high one

w = d · level[q].

IQ4_XS, block of 256 weights, 136 bytes:

    d         float16       bytes 0–1
    scales_h  uint16        bytes 2–3, high 2 bits of the scale of each 32 weights, lowest first
    scales_l  uint8[4]      bytes 4–7, low 4 bits of them, low nibble first
    qs        8 × 16 bytes  bytes 8–135, for each 32 weights as in IQ4_NL

w = d (s − 32) · level[q]. Source: ggml-common.h, block_iq4_nl, block_iq4_xs, kvalues_iq4nl; ggml-quants.c,
dequantize_row_iq4_nl, dequantize_row_iq4_xs.
"""

from __future__ import annotations

import gguf.quants
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats._blocks import f16_bytes, f16_from_bytes
from jquant.formats._grids import (
    bit_fields,
    halves_from_nibbles,
    join_fields,
    nibbles_from_halves,
    scaled,
    words_from_bytes,
    words_to_bytes,
)

LEVELS = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)  # ascending


def levels(codes: Int[Array, "B n"]) -> Float[Array, "B n"]:
    return jnp.asarray(LEVELS).at[codes].get(mode="promise_in_bounds")


def reconstruct_nl(codes: Int[Array, "32 n"], d: Float[Array, " n"]) -> Float[Array, "32 n"]:
    """The product is exact: d has 11 significant bits, a level has 7."""
    return d[None] * levels(codes)


def pack_nl(codes: Int[Array, "32 n"], d: Float[Array, " n"]) -> UInt8[Array, "18 n"]:
    return jnp.concatenate([f16_bytes(d), nibbles_from_halves(codes.astype(jnp.uint8), 32)])


def unpack_nl(data: UInt8[Array, "18 n"]) -> tuple[Int[Array, "32 n"], Float[Array, " n"]]:
    return halves_from_nibbles(data[2:], 32).astype(jnp.int32), f16_from_bytes(data[:2])


Scales = tuple[Float[Array, " n"], Int[Array, "8 n"]]  # d, and s − 32 of each 32 weights


def reconstruct_xs(codes: Int[Array, "256 n"], scales: Scales) -> Float[Array, "256 n"]:
    """Both products are exact: d has 11 significant bits, s − 32 has 5, a level has 7."""
    d, s = scales
    return scaled(d[None] * s.astype(jnp.float32), levels(codes))


def pack_xs(codes: Int[Array, "256 n"], scales: Scales) -> UInt8[Array, "136 n"]:
    d, s = scales
    s = (s + 32).astype(jnp.uint16)
    high, low = join_fields(s >> 4, 2, 8), join_fields((s & 15).astype(jnp.uint8), 4, 2)
    qs = nibbles_from_halves(codes.astype(jnp.uint8), 32)
    return jnp.concatenate([f16_bytes(d), words_to_bytes(high), low, qs])


def unpack_xs(data: UInt8[Array, "136 n"]) -> tuple[Int[Array, "256 n"], Scales]:
    high = bit_fields(words_from_bytes(data[2:4], jnp.uint16), 2, 8).astype(jnp.int32)
    s = (bit_fields(data[4:8], 4, 2).astype(jnp.int32) | high << 4) - 32
    return halves_from_nibbles(data[8:], 32).astype(jnp.int32), (f16_from_bytes(data[:2]), s)


IQ4_NL = Format(
    name="IQ4_NL",
    ggml_type=20,
    block_size=32,
    block_bytes=18,
    reconstruct=reconstruct_nl,
    pack=pack_nl,
    unpack=unpack_nl,
)
IQ4_XS = Format(
    name="IQ4_XS",
    ggml_type=23,
    block_size=256,
    block_bytes=136,
    reconstruct=reconstruct_xs,
    pack=pack_xs,
    unpack=unpack_xs,
)
