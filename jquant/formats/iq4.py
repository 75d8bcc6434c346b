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

Encoding minimises Σ w (x − x̂)² as `_levels` describes. For IQ4_XS the scales c of the runs of 32 are
found first; near them the error of a run is S2 (s d − c)² above its least, which ranks the candidates
for d; then s is tried one step up and down with its own nearest codes, and d refitted.
"""

from __future__ import annotations

import gguf.quants
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats._blocks import f16_bytes, f16_from_bytes, inverse, zeros_along
from jquant.formats._grids import (
    bit_fields,
    halves_from_nibbles,
    join_fields,
    nibbles_from_halves,
    scaled,
    words_from_bytes,
    words_to_bytes,
)
from jquant.formats._levels import (
    fit_scale,
    gain,
    moments,
    nearest_code,
    search_scale,
    signed_peak,
    storable,
    weights,
)

LEVELS = tuple(map(float, gguf.quants.IQ4_NL.kvalues))  # ascending

# Scales to try, as the multiple of the lowest or the highest level that the weight of largest magnitude
# becomes: densely about 1, and up to 2, where it is clipped because little importance rests on it.
_TO_LOWEST = [*np.linspace(0.75, 1.1, 9), 1.2, 1.35, 1.5, 1.7, 2.0]
_TO_HIGHEST = [*np.linspace(0.82, 1.08, 6), 1.2, 1.4, 1.65, 2.0]
LADDER = 1 / np.concatenate([np.multiply(_TO_LOWEST, LEVELS[0]), np.multiply(_TO_HIGHEST, LEVELS[-1])])
# Scales of the superblock to try: the largest scale of a run becomes this multiple of it.
LADDER_XS = np.concatenate([-np.linspace(24, 33, 19), np.linspace(24, 32, 17)])
RETRIES = 2


def level(codes: Int[Array, "B n"]) -> Float[Array, "B n"]:
    return jnp.asarray(LEVELS, jnp.float32).at[codes].get(mode="promise_in_bounds")


def fit_nl(blocks: Float[Array, "32 n"], importance: Float[Array, "32 n"] | None) -> Float[Array, " n"]:
    return fit_scale(blocks, importance, LEVELS, LADDER.tolist())


def assign_nl(
    blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, d: Float[Array, " n"]
) -> Int[Array, "B n"]:
    return nearest_code(blocks, d[None], LEVELS)


def reconstruct_nl(codes: Int[Array, "B n"], d: Float[Array, " n"]) -> Float[Array, "B n"]:
    """The product is exact: d has 11 significant bits, a level has 7."""
    return d[None] * level(codes)


def pack_nl(codes: Int[Array, "32 n"], d: Float[Array, " n"]) -> UInt8[Array, "18 n"]:
    return jnp.concatenate([f16_bytes(d), nibbles_from_halves(codes.astype(jnp.uint8), 32)])


def unpack_nl(data: UInt8[Array, "18 n"]) -> tuple[Int[Array, "32 n"], Float[Array, " n"]]:
    return halves_from_nibbles(data[2:], 32).astype(jnp.int32), f16_from_bytes(data[:2])


Scales = tuple[Float[Array, " n"], Int[Array, "runs n"]]  # d, and s − 32 of each 32 weights


def fit_xs(blocks: Float[Array, "256 n"], importance: Float[Array, "256 n"] | None) -> Scales:
    n = blocks.shape[1]
    peak = signed_peak(blocks)[None]  # [1, 1, n]
    x = blocks.reshape(8, 32, n) * inverse(peak)
    w = weights(blocks, importance).reshape(8, 32, n)
    ladder = jnp.asarray(LADDER, jnp.float32)[:, None, None, None] * signed_peak(x)[None]
    c, gains = search_scale(x, w, LEVELS, ladder)  # [8, 1, n]

    def stored(d: Array) -> Array:
        return storable(d * peak) * inverse(peak)

    def retried(d: Array, s: Array) -> tuple[Array, ...]:
        """(gain, s, s S1, s² S2) of the best of s − 1, s, s + 1 for each run, with nearest codes."""

        def better(step: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
            tried = jnp.clip(s + step.astype(jnp.float32), -32, 31)
            s1, s2 = moments(x, w, tried * d, LEVELS)
            found = (gain(tried * d, s1, s2), tried, tried * s1, tried**2 * s2)
            return tuple(
                jnp.where(found[0] > best[0], new, old) for new, old in zip(found, best, strict=True)
            )

        zero = zeros_along(s)
        return lax.fori_loop(-1, 2, better, (zero - 1, zero, zero, zero))

    def better(
        _: Array, state: tuple[tuple[Array, ...], Array, Array]
    ) -> tuple[tuple[Array, ...], Array, Array]:
        best, d, s = state
        gains, s, s1, s2 = retried(d, s)
        total = jnp.sum(gains, axis=0, keepdims=True)
        best = tuple(
            jnp.where(total > best[0], new, old) for new, old in zip((total, d, s), best, strict=True)
        )
        refitted = jnp.sum(s1, axis=0, keepdims=True) * inverse(jnp.sum(s2, axis=0, keepdims=True))
        return best, stored(refitted), s

    d = stored(superblock_scale(c, gains * inverse(c) ** 2))
    s = nearest_s(c, d)
    best, _, _ = lax.fori_loop(0, RETRIES, better, ((zeros_along(d) - 1, d, s), d, s))
    _, d, s = best
    return storable(d * peak)[0, 0], s[:, 0].astype(jnp.int32)


def nearest_s(c: Array, d: Array) -> Array:
    return jnp.clip(jnp.round(c * inverse(d)), -32, 31)


def superblock_scale(c: Array, s2: Array) -> Array:
    """The d [1, 1, n] of a ladder that comes nearest, as Σ S2 (s d − c)², to the scales c [8, 1, n]."""
    largest = signed_peak(jnp.swapaxes(c, 0, 1))  # [1, 1, n]
    ladder = jnp.asarray(1 / LADDER_XS, jnp.float32)

    def better(k: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        d = largest * ladder[k]
        excess = jnp.sum(s2 * (nearest_s(c, d) * d - c) ** 2, axis=0, keepdims=True)
        return jnp.minimum(excess, best[0]), jnp.where(excess < best[0], d, best[1])

    zero = zeros_along(largest)
    first = (zero + jnp.inf, zero)
    return lax.fori_loop(0, len(LADDER_XS), better, first)[1]


def assign_xs(
    blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, scales: Scales
) -> Int[Array, "B n"]:
    d, s = scales
    n = d.shape[0]
    run_scales = (d[None] * s.astype(jnp.float32))[:, None]  # [8, 1, n]
    return nearest_code(blocks.reshape(len(s), -1, n), run_scales, LEVELS).reshape(-1, n)


def reconstruct_xs(codes: Int[Array, "B n"], scales: Scales) -> Float[Array, "B n"]:
    """Both products are exact: d has 11 significant bits, s − 32 has 5, a level has 7."""
    d, s = scales
    return scaled(d[None] * s.astype(jnp.float32), level(codes))


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
    fit=fit_nl,
    assign=assign_nl,
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
    fit=fit_xs,
    assign=assign_xs,
    reconstruct=reconstruct_xs,
    pack=pack_xs,
    unpack=unpack_xs,
)
