"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 consecutive weights share one scale d, or a scale and a minimum m.

Bytes of a block (d and m float16, little endian; byte j of qs holds q[j] | q[j + 16] << 4):

    type   bytes  layout                                       weights
    Q4_0   18     d 2, qs 16                                   d (q − 8),   q in [0, 15]
    Q4_1   20     d 2, m 2, qs 16                              d q + m,     q in [0, 15]
    Q5_0   22     d 2, qh 4 (bit j: the fifth of q[j]), qs 16  d (q − 16),  q in [0, 31]
    Q5_1   24     d 2, m 2, qh 4, qs 16                        d q + m,     q in [0, 31]
    Q8_0   34     d 2, q int8 32                               d q,         q in [−127, 127]

Without importance the bytes are those of ggml's C encoder, which takes codes from the scale before its
rounding to float16. With importance, `_least_squares` searches the scale that minimises Σ w (x − x̂)².

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_*_ref and dequantize_row_*; ggml-common.h for layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Integer, UInt8

from jquant.core import Format
from jquant.formats._blocks import exact_div, f16_bytes, f16_from_bytes, f16_round, inverse, rounded
from jquant.formats._least_squares import search_affine, search_scale
from jquant.formats._tiny import LEAST, magnify, on_subnormal_grid

Blocks = Float[Array, "B n"]
Codes = Integer[Array, "B n"]


class Scale(NamedTuple):
    """d, not yet rounded to float16, and the factor that turns weights into codes."""

    d: Float[Array, " n"]
    inverse: Float[Array, " n"]  # 1/d; 0 where d is 0, infinite where 1/d exceeds float32


class Affine(NamedTuple):
    d: Float[Array, " n"]
    m: Float[Array, " n"]
    inverse: Float[Array, " n"]


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


# C compares floats; we compare their bits as integers, for XLA takes subnormals for zeros on a CPU.


def _starts_negative(blocks: Blocks, among: Array) -> Array:
    """Whether the first weight of a block that is `among` [32, n] has a sign bit: bool [n]."""
    rank = jnp.arange(64, 0, -2, dtype=jnp.int32)[:, None]
    sign = (_bits(blocks) < 0).astype(jnp.int32)
    return (jnp.max(jnp.where(among, rank + sign, 0), axis=0) & 1) == 1


def _peak(blocks: Blocks) -> Array:
    """The weight of largest magnitude: [n]. Of several it is the first, as in C, and the sign is its."""
    size = _bits(blocks) & 0x7FFFFFFF
    largest = jnp.max(size, axis=0)
    negative = _starts_negative(blocks, size == largest[None])
    return _float(jnp.where(negative & (largest > 0), largest | -0x80000000, largest))


def _ordered(bits: Array) -> Array:
    """float32 bits ↔ integers of the same order (−0 just before 0); its own inverse."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _smallest(blocks: Blocks) -> Array:
    """The smallest weight: [n]. Of zeros it is the first, as in C: float16 keeps the sign of m."""
    bits = _bits(blocks)
    least = _ordered(jnp.min(_ordered(bits), axis=0))
    negative = _starts_negative(blocks, (bits & 0x7FFFFFFF) == 0)
    zero = jnp.where(negative, -0x80000000, 0)
    return _float(jnp.where((least & 0x7FFFFFFF) == 0, zero, least))


def _largest(blocks: Blocks) -> Array:
    return _float(_ordered(jnp.max(_ordered(_bits(blocks)), axis=0)))


def fit_symmetric(blocks: Blocks, importance: Blocks | None, levels: int) -> Scale:
    """Q4_0 and Q5_0: codes −levels … levels − 1; the weight of largest magnitude gets −levels.

    importance: see `_least_squares.search_scale`.
    """
    if importance is not None:
        ratios = np.linspace(0.78, 1.35, 8)
        ladder = np.concatenate([-levels * ratios, (levels - 1) * ratios])
        return _stored(search_scale(blocks, importance, -levels, levels - 1, ladder))
    peak = _peak(blocks)
    peak, unit = magnify(peak, jnp.abs(peak) < LEAST)
    return _scale(peak / -levels, unit)


def fit_q8_0(blocks: Blocks, importance: Blocks | None) -> Scale:
    """Codes −127 … 127; the weight of largest magnitude gets ±127.

    importance: see `_least_squares.search_scale`. ggml ignores it.
    """
    if importance is not None:
        return _stored(search_scale(blocks, importance, -127, 127, 127 * np.linspace(0.9, 1.01, 13)))
    size = _float(jnp.max(_bits(blocks) & 0x7FFFFFFF, axis=0))
    size, unit = magnify(size, size < LEAST)
    return _scale(exact_div(size, 127.0), unit)


def fit_affine(blocks: Blocks, importance: Blocks | None, levels: int) -> Affine:
    """Q4_1 and Q5_1: the smallest weight gets code 0, the largest gets `levels`.

    importance: see `_least_squares.search_affine`.
    """
    if importance is not None:
        d, m = search_affine(blocks, importance, levels)
        return Affine(d, m, inverse(d))
    m, largest = _smallest(blocks), _largest(blocks)
    tiny = jnp.maximum(jnp.abs(m), jnp.abs(largest)) < LEAST
    top, unit = magnify(largest, tiny)
    bottom, _ = magnify(m, tiny)
    d, inverse_d = _scale(exact_div(top - bottom, float(levels)), unit)
    return Affine(d, m, inverse_d)


def _scale(d: Array, unit: Array) -> Scale:
    """The scale d / unit of weights that were magnified by unit."""
    d = on_subnormal_grid(d, unit)
    return Scale(d / unit, inverse(d) * unit)


def _stored(d: Array) -> Scale:
    return Scale(d, inverse(d))


def _codes(rule: Callable[..., Codes], inverse: Array, *arrays: Array) -> Codes:
    """rule(factor [1, n], *arrays), tiny blocks magnified; 0 where 1/d is infinite, as in C."""
    tiny = jnp.abs(inverse) > 1 / LEAST

    def careful() -> Codes:
        factor = (inverse / magnify(inverse, tiny)[1])[None]
        q = rule(factor, *(magnify(a, tiny)[0] for a in arrays))
        return jnp.where(jnp.isfinite(factor), q, jnp.zeros_like(q))

    return lax.cond(jnp.any(tiny), careful, lambda: rule(inverse[None], *arrays))


def assign_symmetric(blocks: Blocks, importance: Blocks | None, scales: Scale, levels: int) -> Codes:
    """q = ⌊x/d + levels + 1/2⌋, clipped to [0, 2 levels − 1]: the nearest code, for any importance."""

    def rule(factor: Array, x: Array) -> Codes:
        q = rounded(x * factor) + (levels + 0.5)
        return jnp.clip(q, 0.0, 2 * levels - 0.5).astype(jnp.uint8)

    return _codes(rule, scales.inverse, blocks)


def assign_affine(blocks: Blocks, importance: Blocks | None, scales: Affine, levels: int) -> Codes:
    """q = ⌊(x − m)/d + 1/2⌋, clipped to [0, levels]."""

    def rule(factor: Array, x: Array, m: Array) -> Codes:
        q = rounded((x - m[None]) * factor) + 0.5
        return jnp.clip(q, 0.0, levels + 0.5).astype(jnp.uint8)

    return _codes(rule, scales.inverse, blocks, scales.m)


def assign_q8_0(blocks: Blocks, importance: Blocks | None, scales: Scale) -> Codes:
    """q = x/d rounded to nearest, halves away from zero, clipped to [−127, 127]."""

    def rule(factor: Array, x: Array) -> Codes:
        q = lax.round(x * factor, lax.RoundingMethod.AWAY_FROM_ZERO)
        return jnp.clip(q, -127.0, 127.0).astype(jnp.int8)

    return _codes(rule, scales.inverse, blocks)


def reconstruct_symmetric(codes: Codes, scales: Scale, offset: int) -> Blocks:
    return f16_round(scales.d)[None] * (codes.astype(jnp.float32) - offset)


def reconstruct_affine(codes: Codes, scales: Affine) -> Blocks:
    # float16 times a few bits is exact in float32, so a fused multiply-add rounds as two steps do.
    return f16_round(scales.d)[None] * codes.astype(jnp.float32) + f16_round(scales.m)[None]


def _pack_codes(codes: Codes, bits: int) -> list[Array]:
    """qh (five bits only) and qs, as rows of bytes."""
    low = codes & 0xF
    qs = low[:16] | low[16:] << 4
    if bits == 4:
        return [qs]
    high = (codes >> 4).reshape(4, 8, -1)  # [byte, bit, block]
    shifts = jnp.arange(8, dtype=jnp.uint8)[None, :, None]
    return [jnp.sum(high << shifts, axis=1, dtype=jnp.uint8), qs]


def _unpack_codes(data: UInt8[Array, "bytes n"], bits: int) -> Codes:
    qs = data[-16:]
    q = jnp.concatenate([qs & 0xF, qs >> 4])
    if bits == 5:
        shifts = jnp.arange(8, dtype=jnp.uint8)[None, :, None]
        high = data[-20:-16, None] >> shifts & 1  # [byte, bit, block]
        q = q | high.reshape(32, -1) << 4
    return q


def pack_symmetric(codes: Codes, scales: Scale, bits: int) -> UInt8[Array, "bytes n"]:
    return jnp.concatenate([f16_bytes(scales.d), *_pack_codes(codes, bits)])


def pack_affine(codes: Codes, scales: Affine, bits: int) -> UInt8[Array, "bytes n"]:
    return jnp.concatenate([f16_bytes(scales.d), f16_bytes(scales.m), *_pack_codes(codes, bits)])


def pack_q8_0(codes: Codes, scales: Scale) -> UInt8[Array, "34 n"]:
    return jnp.concatenate([f16_bytes(scales.d), lax.bitcast_convert_type(codes, jnp.uint8)])


def unpack_symmetric(data: UInt8[Array, "bytes n"], bits: int) -> tuple[Codes, Scale]:
    return _unpack_codes(data, bits), _stored(f16_from_bytes(data[:2]))


def unpack_affine(data: UInt8[Array, "bytes n"], bits: int) -> tuple[Codes, Affine]:
    d, m = f16_from_bytes(data[:2]), f16_from_bytes(data[2:4])
    return _unpack_codes(data, bits), Affine(d, m, inverse(d))


def unpack_q8_0(data: UInt8[Array, "34 n"]) -> tuple[Codes, Scale]:
    q = lax.bitcast_convert_type(data[2:], jnp.int8)
    return q, _stored(f16_from_bytes(data[:2]))


def _symmetric(name: str, ggml_type: int, bits: int) -> Format:
    levels = 1 << (bits - 1)
    return Format(
        name=name,
        ggml_type=ggml_type,
        block_size=32,
        block_bytes=2 + 4 * bits,
        fit=partial(fit_symmetric, levels=levels),
        assign=partial(assign_symmetric, levels=levels),
        reconstruct=partial(reconstruct_symmetric, offset=levels),
        pack=partial(pack_symmetric, bits=bits),
        unpack=partial(unpack_symmetric, bits=bits),
    )


def _affine(name: str, ggml_type: int, bits: int) -> Format:
    levels = (1 << bits) - 1
    return Format(
        name=name,
        ggml_type=ggml_type,
        block_size=32,
        block_bytes=4 + 4 * bits,
        fit=partial(fit_affine, levels=levels),
        assign=partial(assign_affine, levels=levels),
        reconstruct=reconstruct_affine,
        pack=partial(pack_affine, bits=bits),
        unpack=partial(unpack_affine, bits=bits),
    )


Q4_0 = _symmetric("Q4_0", 2, bits=4)
Q4_1 = _affine("Q4_1", 3, bits=4)
Q5_0 = _symmetric("Q5_0", 6, bits=5)
Q5_1 = _affine("Q5_1", 7, bits=5)
Q8_0 = Format(
    name="Q8_0",
    ggml_type=8,
    block_size=32,
    block_bytes=34,
    fit=fit_q8_0,
    assign=assign_q8_0,
    reconstruct=partial(reconstruct_symmetric, offset=0),
    pack=pack_q8_0,
    unpack=unpack_q8_0,
)
