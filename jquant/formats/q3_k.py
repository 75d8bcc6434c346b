"""Q3_K: 256 weights share d; each 16 share a 6-bit scale sc, so that w ≈ d sc q with q in [−4, 3].

Block, 110 bytes: hmask 32 (high bit of the codes), qs 64 (low 2 bits), scales 12, d float16. 3.4375 bits
per weight. Codes are stored as q + 4, scales as sc + 32. Bit b of hmask[l] belongs to weight 32 b + l;
qs[32 h + l] holds weights 128 h + l + (0, 32, 64, 96), for l < 32. scales[j], j < 8, holds the low nibbles
of groups j and j + 8; scales[8 + k] the high 2 bits of groups k, k + 4, k + 8, k + 12.
Source: llama.cpp, ggml-quants.c, dequantize_row_q3_K.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8, UInt8

from jquant.core import Format
from jquant.formats import _scale
from jquant.formats._blocks import f16_bytes, f16_from_bytes, joined_bits, stacked_bytes

LIMITS = _scale.Limits(q_min=-4, q_max=3, sc_min=-32, sc_max=31)

# Scales tried for a group: its largest weight divided by LARGEST_AT, then its heaviest by HEAVIEST_AT.
LARGEST_AT = (-5.0, -4.6, -4.2, -3.8, -3.4, -3.0, -2.6, -2.2)
HEAVIEST_AT = (-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0)
# d tried for a superblock: its largest scale divided by these.
LARGEST_SCALE_AT = (-34.0, -33.0, -32.0, -31.0, -30.0, -29.0, -28.0, -27.0)


def fit(blocks: Float[Array, "256 n"], importance: Float[Array, "256 n"] | None) -> _scale.Scales:
    """Real scales of the groups, then d, then the integer scales.

    One weight may outweigh its whole superblock, as importance of a few columns often does: it pays to
    try scales at which it has no error at all.
    """
    x, w = _scale.grouped(blocks, importance, LIMITS)
    _, largest = _scale.at_largest(jnp.abs(x), x)
    trials = largest[None] / _scale.trial_axis(LARGEST_AT)
    if w is not None:
        trials = jnp.concatenate([trials, _scale.heaviest(x, w)[None] / _scale.trial_axis(HEAVIEST_AT)])
    group = _scale.fit_groups(x, w, trials, LIMITS)
    d = _fit_d(group, w is not None)
    sc = _scale.nearest_sc(group.scale, d[None], LIMITS)
    d = _scale.refit(x, w, d, sc, LIMITS)
    return d, _scale.refine(x, w, d, sc, LIMITS).astype(jnp.int8)


def _fit_d(group: _scale.GroupFit, anchored: bool) -> Array:
    """d [n] such that Σ B (s − d sc)² is least over the groups, each trial with its best d."""
    scale, curvature = group.scale[None], group.curvature[None]
    bound, largest = _scale.at_largest(jnp.abs(group.scale), group.scale)
    d = largest[None, None] / _scale.trial_axis(LARGEST_SCALE_AT)  # [trial, 1, n]
    if anchored:  # the group with most to lose has an exact scale
        _, anchor = _scale.at_largest(group.gain, group.scale)
        k = jnp.floor(32.5 * jnp.abs(anchor) * _scale.inverse(bound))
        k = jnp.maximum(k[None, None] - _scale.trial_axis(range(8)), 1.0)
        d = jnp.concatenate([d, anchor[None, None] / k, -anchor[None, None] / k])
    sc = _scale.nearest_sc(scale, d, LIMITS)  # [trial, 16, n]
    A, B = _scale.moments(scale, curvature, sc)  # [trial, n]
    d = _scale.storable(A * _scale.inverse(B))
    rest = scale - d[:, None] * sc
    return _scale.at_largest(-_scale.total(curvature * rest * rest), d)[1]


def pack(codes: Int8[Array, "256 n"], scales: _scale.Scales) -> UInt8[Array, "110 n"]:
    d, sc = scales
    n = codes.shape[-1]
    q = (codes - LIMITS.q_min).astype(jnp.uint8)
    hmask = joined_bits((q >> 2).reshape(8, 32, n), 1, axis=0)
    qs = joined_bits((q & 3).reshape(2, 4, 32, n), 2, axis=1).reshape(64, n)
    u = (sc - LIMITS.sc_min).astype(jnp.uint8)
    low = joined_bits((u & 15).reshape(2, 8, n), 4, axis=0)
    high = joined_bits((u >> 4).reshape(4, 4, n), 2, axis=0)
    return stacked_bytes(hmask, qs, low, high, f16_bytes(d))


def unpack(data: UInt8[Array, "110 n"]) -> tuple[Int8[Array, "256 n"], _scale.Scales]:
    n = data.shape[-1]
    hmask, qs, low, high, d = jnp.split(data, (32, 96, 104, 108))
    qs = qs.reshape(2, 1, 32, n)
    q = jnp.concatenate([qs, qs >> 2, qs >> 4, qs >> 6], axis=1).reshape(256, n) & 3
    q = q | (jnp.concatenate([hmask >> b for b in range(8)]) & 1) << 2
    u = jnp.concatenate([low & 15, low >> 4])
    u = u | (jnp.concatenate([high, high >> 2, high >> 4, high >> 6]) & 3) << 4
    sc = u.astype(jnp.int8) + jnp.int8(LIMITS.sc_min)
    return q.astype(jnp.int8) + jnp.int8(LIMITS.q_min), (f16_from_bytes(d), sc)


Q3_K = Format(
    name="Q3_K",
    ggml_type=11,
    block_size=256,
    block_bytes=110,
    fit=fit,
    assign=partial(_scale.assign, limits=LIMITS),
    reconstruct=_scale.reconstruct,
    pack=pack,
    unpack=unpack,
)
