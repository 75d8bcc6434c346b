"""MXFP4, 4.25 bits per weight: 4-bit floats (E2M1) times a power of two.

Block of 32 weights, 17 bytes:

    e   uint8               byte 0, the exponent (E8M0)
    qs  uint8[16]           bytes 1–16, weight j in the low nibble of byte j, weight 16 + j in the high one

w = 2^(e − 127) · (−1)^sign · {0, ½, 1, 1½, 2, 3, 4, 6}, the sign in the nibble's high bit; the code for −0
is +0. e = 255, NaN in the OCP specification, is one more exponent to ggml.
Source: ggml-common.h, block_mxfp4; ggml-quants.c, dequantize_row_mxfp4; ggml-impl.h,
ggml_e8m0_to_fp32_half; OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats._blocks import zeros_along
from jquant.formats._e2m1 import gain_of_scale, nearest_code
from jquant.formats._grids import halves_from_nibbles, nibbles_from_halves
from jquant.formats._levels import weights

# Exponents to try, relative to the one that puts the largest weight in [4, 8), where 6 is the top.
STEPS = range(-6, 2)


def times_power_of_two(x: Array, k: Array) -> Array:
    """x · 2^k for |k| ≤ 252, exact where the result is normal."""

    def power(k: Array) -> Array:
        return lax.bitcast_convert_type(k + 127 << 23, jnp.float32)

    return x * power(k >> 1) * power(k - (k >> 1))


def fit(blocks: Float[Array, "32 n"], importance: Float[Array, "32 n"] | None) -> Int[Array, " n"]:
    """The exponent of least weighted error, of all that are worth a try."""
    size = jnp.abs(blocks)
    peak = jnp.max(size, axis=0, keepdims=True)
    k = (lax.bitcast_convert_type(peak, jnp.int32) >> 23) - 127  # ⌊log₂ peak⌋
    x, w = times_power_of_two(size, -k), weights(blocks, importance)  # the largest of x is in [1, 2)

    def better(step: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        gains = gain_of_scale(x, w, jnp.full_like(peak, 2.0**-2) * 2.0 ** step.astype(jnp.float32))
        return jnp.maximum(gains, best[0]), jnp.where(gains > best[0], step, best[1])

    zero = zeros_along(k)
    step = lax.fori_loop(STEPS.start, STEPS.stop, better, (zeros_along(peak) - 1, zero))[1]
    return jnp.clip(k - 2 + step + 127, 0, 254)[0]


def assign(
    blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, e: Int[Array, " n"]
) -> Int[Array, "B n"]:
    x = times_power_of_two(blocks, 127 - e[None])
    return nearest_code(x, jnp.ones_like(x[:1]))


def reconstruct(codes: Int[Array, "B n"], e: Int[Array, " n"]) -> Float[Array, "B n"]:
    """2^(e − 127) times an E2M1 value, put together from its bits.

    The smallest products are subnormal, and multiplication may flush those to zero; bits do not.
    Of a code's low three bits c, 1 is ½, and c ≥ 2 is (1 + h / 2) 2^(k − 1) with k = c >> 1, h = c & 1.
    """
    c = codes & 7
    half = jnp.where(c > 1, c & 1, 0)
    exponent = e[None] + jnp.where(c > 1, (c >> 1) - 1, -1)  # biased by 127
    fraction = (2 + half) << 22  # 24 bits, the leading one included
    normal = (exponent << 23) + (fraction - (1 << 23))
    subnormal = fraction >> jnp.maximum(1 - exponent, 0)
    magnitude = jnp.where(exponent > 0, normal, subnormal)
    magnitude = jnp.where(exponent > 254, 255 << 23, magnitude)  # infinity
    sign = (codes >> 3).astype(jnp.uint32) << 31
    bits = jnp.where(c == 0, jnp.uint32(0), magnitude.astype(jnp.uint32) | sign)
    return lax.bitcast_convert_type(bits, jnp.float32)


def pack(codes: Int[Array, "32 n"], e: Int[Array, " n"]) -> UInt8[Array, "17 n"]:
    return jnp.concatenate([e.astype(jnp.uint8)[None], nibbles_from_halves(codes.astype(jnp.uint8), 32)])


def unpack(data: UInt8[Array, "17 n"]) -> tuple[Int[Array, "32 n"], Int[Array, " n"]]:
    return halves_from_nibbles(data[1:], 32).astype(jnp.int32), data[0].astype(jnp.int32)


MXFP4 = Format(
    name="MXFP4",
    ggml_type=39,
    block_size=32,
    block_bytes=17,
    fit=fit,
    assign=assign,
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
)
