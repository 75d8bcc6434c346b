"""Q6_K: 256 weights share d; each 16 share an 8-bit scale sc, so that w ≈ d sc q with q in [−32, 31].

Block, 210 bytes: ql 128 (low 4 bits), qh 64 (high 2 bits), sc 16 × int8, d float16. 6.5625 bits per weight.
Codes are stored as q + 32. Of each half of 128 weights, ql[l] holds weights l and l + 64, ql[32 + l] holds
l + 32 and l + 96, and qh[l] the high bits of all four, for l < 32.
Source: llama.cpp, ggml-quants.c, dequantize_row_q6_K.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int8, UInt8

from jquant.core import Format
from jquant.formats import _scale
from jquant.formats._blocks import f16_bytes, f16_from_bytes, joined_bits, stacked_bytes

LIMITS = _scale.Limits(q_min=-32, q_max=31, sc_min=-128, sc_max=127)
SCALES_TRIED = 16  # for each group
D_TRIED = 6  # for each superblock


def fit(blocks: Float[Array, "256 n"], importance: Float[Array, "256 n"] | None) -> _scale.Scales:
    """Real scales of the groups, then d, then the integer scales.

    With six bits, rounding errors of a group are nearly random in its scale, so the best of several is much
    better than the first. Scales tried are those that hit the heaviest weight exactly, with the largest
    weight at code −32, −31, … −17. Likewise d hits the scale of the group that has most to lose.
    """
    x, w = _scale.grouped(blocks, importance, LIMITS)
    heaviest = _scale.heaviest(x, w)
    bound, largest = _scale.at_largest(jnp.abs(x), x)
    code = jnp.round(-LIMITS.q_min * jnp.abs(heaviest) * _scale.inverse(bound))
    code = jnp.maximum(code[None] - _scale.trial_axis(range(SCALES_TRIED)), 1.0)
    trials = (-jnp.sign(largest) * jnp.abs(heaviest))[None] / code  # the negative side has one code more
    group = _scale.fit_groups(x, w, trials, LIMITS)
    d = _fit_d(x, w, group)
    sc = _scale.nearest_sc(group.scale, d[None], LIMITS)
    d = _scale.refit(x, w, d, sc, LIMITS)
    return d, _scale.refine(x, w, d, sc, LIMITS).astype(jnp.int8)


def _fit_d(x: Array, w: Array | None, group: _scale.GroupFit) -> Array:
    """d [n], by true error: the anchor's scale is exactly −k d, for a few k near the limit."""
    _, anchor = _scale.at_largest(group.gain, group.scale)
    largest = jnp.max(jnp.abs(group.scale), axis=0)
    k = jnp.floor((0.5 - LIMITS.sc_min) * jnp.abs(anchor) * _scale.inverse(largest))
    k = jnp.maximum(k[None, None] - _scale.trial_axis(range(D_TRIED)), 1.0)
    d = _scale.storable(-anchor[None, None] / k)  # [trial, 1, n]
    trials = d * _scale.nearest_sc(group.scale[None], d, LIMITS)
    errors = lax.map(lambda s: _scale.total(_scale.error(x, w, s, LIMITS)), trials)
    return _scale.at_largest(-errors, d[:, 0])[1]


def pack(codes: Int8[Array, "256 n"], scales: _scale.Scales) -> UInt8[Array, "210 n"]:
    d, sc = scales
    n = codes.shape[-1]
    q = (codes - LIMITS.q_min).astype(jnp.uint8)
    ql = joined_bits((q & 15).reshape(2, 2, 64, n), 4, axis=1)  # [half, low or high nibble, l, n]
    qh = joined_bits((q >> 4).reshape(2, 4, 32, n), 2, axis=1)
    sc = lax.bitcast_convert_type(sc, jnp.uint8)
    return stacked_bytes(ql.reshape(128, n), qh.reshape(64, n), sc, f16_bytes(d))


def unpack(data: UInt8[Array, "210 n"]) -> tuple[Int8[Array, "256 n"], _scale.Scales]:
    n = data.shape[-1]
    ql, qh, sc, d = jnp.split(data, (128, 192, 208))
    ql = ql.reshape(2, 2, 32, n)
    qh = qh.reshape(2, 1, 32, n)
    low = jnp.concatenate([ql & 15, ql >> 4], axis=1)  # [half, quarter, l, n]
    high = jnp.concatenate([qh, qh >> 2, qh >> 4, qh >> 6], axis=1) & 3
    codes = (low | high << 4).astype(jnp.int8) + jnp.int8(LIMITS.q_min)
    return codes.reshape(256, n), (f16_from_bytes(d), lax.bitcast_convert_type(sc, jnp.int8))


Q6_K = Format(
    name="Q6_K",
    ggml_type=14,
    block_size=256,
    block_bytes=210,
    fit=fit,
    assign=partial(_scale.assign, limits=LIMITS),
    reconstruct=_scale.reconstruct,
    pack=pack,
    unpack=unpack,
)
