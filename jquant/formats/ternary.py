"""TQ1_0 and TQ2_0, 1.6875 and 2.0625 bits per weight: −1, 0 or 1 times one scale.

TQ1_0, block of 256 weights, 54 bytes:

    qs  uint8[48]           bytes 0–47, five ternary digits each
    qh  uint8[4]            bytes 48–51, four digits each
    d   float16             bytes 52–53

With digits t₀ (first) to t₄ (last), value v = 81 t₀ + 27 t₁ + 9 t₂ + 3 t₃ + t₄ is stored as the fraction
⌈256 v / 243⌉ / 256, so that multiplying the byte by 3 moves the next digit above the point. Digit k of
byte j belongs to weight 32 k + j in the first 32 bytes, to 160 + 16 k + j in the next 16, and to
240 + 4 k + j in qh.

TQ2_0, block of 256 weights, 66 bytes:

    qs  uint8[64]           bytes 0–63; in each half of 32 bytes, bits 2 k, 2 k + 1 of byte j hold weight
                            32 k + j of 128
    d   float16             bytes 64–65

w = d (q − 1). Source: ggml-common.h, block_tq1_0, block_tq2_0; ggml-quants.c, dequantize_row_tq1_0,
dequantize_row_tq2_0, quantize_row_tq1_0_ref.

Encoding. The best codes for d are 0 up to |x| = d/2, so the best d belongs to a threshold on |x|: with
S1 = Σ w |x| and S2 = Σ w over the weights above it, d = S1 / S2. Thresholds are tried on a geometric ladder
from the bulk of the block to its largest weight, then refitted as `_levels` describes. A block that is a
scale times −1, 0, 1 keeps its values where float16 has the scale.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats._blocks import f16_bytes, f16_from_bytes, inverse, storable
from jquant.formats._levels import nearest_code, search_scale, weights

LEVELS = (-1.0, 0.0, 1.0)
STEPS = 24

# Bytes [start, stop) and the digits they hold: TQ1_0's three runs, each digit-major.
_RUNS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))


def fit(blocks: Float[Array, "256 n"], importance: Float[Array, "256 n"] | None) -> Float[Array, " n"]:
    size = jnp.abs(blocks)
    peak = jnp.max(size, axis=0, keepdims=True)
    x, w = size * inverse(peak), weights(blocks, importance)
    mean = jnp.sum(w * x, axis=0, keepdims=True) * inverse(jnp.sum(w, axis=0, keepdims=True))
    fractions = jnp.linspace(0, 1, STEPS)[:, None, None]
    # d is twice the threshold: from half the mean size, below any optimum, to ggml's own choice and beyond.
    lowest = jnp.clip(mean, 1e-6, 1.0)[None]
    ladder = lowest * (1.9 / lowest) ** fractions
    ladder = jnp.concatenate([ladder, jnp.ones_like(peak)[None]])
    return storable(search_scale(x, w, LEVELS[1:], ladder)[0] * peak)[0]


def assign(
    blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, d: Float[Array, " n"]
) -> Int[Array, "B n"]:
    return nearest_code(blocks, d[None], LEVELS)


def reconstruct(codes: Int[Array, "B n"], d: Float[Array, " n"]) -> Float[Array, "B n"]:
    """The product is exact. Codes are 0, 1, 2; TQ2_0 could also hold 3, which a runtime reads as 2 d."""
    return d[None] * (codes - 1).astype(jnp.float32)


def pack_tq1(codes: Int[Array, "256 n"], d: Float[Array, " n"]) -> UInt8[Array, "54 n"]:
    """The unused fifth digit of qh is 0."""
    n = d.shape[0]
    data, start = [], 0
    for first, last, digits in _RUNS:
        run = codes[start : start + (last - first) * digits].astype(jnp.int32).reshape(digits, -1, n)
        value = sum((run[k] * 3 ** (4 - k) for k in range(1, digits)), run[0] * 81)
        data.append(((value * 256 + 242) // 243).astype(jnp.uint8))
        start += (last - first) * digits
    return jnp.concatenate([*data, f16_bytes(d)])


def unpack_tq1(data: UInt8[Array, "54 n"]) -> tuple[Int[Array, "256 n"], Float[Array, " n"]]:
    codes = []
    for first, last, digits in _RUNS:
        fraction = data[first:last].astype(jnp.int32)
        for _ in range(digits):
            codes.append(fraction * 3 >> 8)
            fraction = fraction * 3 & 255
    return jnp.concatenate(codes), f16_from_bytes(data[52:])


def pack_tq2(codes: Int[Array, "256 n"], d: Float[Array, " n"]) -> UInt8[Array, "66 n"]:
    n = d.shape[0]
    q = codes.astype(jnp.uint8).reshape(2, 4, 32, n)
    qs = q[:, 0] | q[:, 1] << 2 | q[:, 2] << 4 | q[:, 3] << 6
    return jnp.concatenate([qs.reshape(64, n), f16_bytes(d)])


def unpack_tq2(data: UInt8[Array, "66 n"]) -> tuple[Int[Array, "256 n"], Float[Array, " n"]]:
    n = data.shape[1]
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[None, :, None, None]
    q = data[:64].reshape(2, 1, 32, n) >> shifts & 3
    return q.reshape(256, n).astype(jnp.int32), f16_from_bytes(data[64:])


TQ1_0 = Format(
    name="TQ1_0",
    ggml_type=34,
    block_size=256,
    block_bytes=54,
    fit=fit,
    assign=assign,
    reconstruct=reconstruct,
    pack=pack_tq1,
    unpack=unpack_tq1,
)
TQ2_0 = Format(
    name="TQ2_0",
    ggml_type=35,
    block_size=256,
    block_bytes=66,
    fit=fit,
    assign=assign,
    reconstruct=reconstruct,
    pack=pack_tq2,
    unpack=unpack_tq2,
)
