"""The asymmetric K types Q2_K, Q4_K and Q5_K: w ≈ d·sc·q − dmin·m, and the search for all five.

256 weights share d and dmin (float16); groups of 16 or 32 share the integers sc and m; q ≥ 0 is the code.

Terms
    s, o        scale d·sc and offset −dmin·m ≤ 0 of a group
    z, c        a group's weights about their weighted mean c, so that Σ w z = 0: x = c + z
    W           Σ w of a group
    mean, V     of given codes: their weighted mean q̄ and Σ w (q − q̄)²
    slope       of given codes: Σ w z q / V, the best scale where the offset is free

With those the error of a group is, for any s and o,

    Σ w (x − s q − o)² = W (s q̄ + o − c)² + V (s − slope)² + Σ w z² − V slope²                     (1)

so after one pass over the weights every choice of scales for these codes costs a few operations per group.
Sums about the mean stay accurate where one weight's importance exceeds the others' a millionfold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt8

from jquant.formats._blocks import F16_MAX, f16_from_bytes, unit_of

Blocks = Float[Array, "B n"]
Codes = UInt8[Array, "B n"]


class Layout(NamedTuple):
    """What tells the three types apart: their integers' ranges, and how far the search goes."""

    groups: int
    q_max: int
    sc_max: int  # of sc and of m
    # First guesses (e, l): the group's range is laid on codes [−l, q_max + e − l], then cut to [0, q_max].
    starts: tuple[tuple[float, float], ...]
    # Guesses of d (and dmin): the largest scale (offset) of the groups gets this integer.
    tops: tuple[float, ...]


class Scales(NamedTuple):
    """d and dmin as float16 holds them; sc and m integers up to sc_max."""

    d: Float[Array, " n"]
    dmin: Float[Array, " n"]
    sc: UInt8[Array, "groups n"]
    m: UInt8[Array, "groups n"]


class _Groups(NamedTuple):
    """Weights [groups, weights of a group, n], in units of a power of two near the block's largest."""

    z: Array
    w: Array | None
    wz: Array
    W: Array  # [groups, n], as the following
    c: Array
    low: Array  # of z
    high: Array
    unit: Array  # [n]


class _Moments(NamedTuple):
    mean: Array  # q̄ [groups, n]
    V: Array
    slope: Array


def _inverse(x: Array) -> Array:
    """1/x, and 0 where x is not positive."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)


def _limited(x: Array, top: int) -> Array:
    return jnp.clip(jnp.round(x), 0.0, float(top))


def _storable(d: Array, unit: Array) -> Array:
    """d ≥ 0 in `unit`s, rounded to a finite float16. What is not 0 stays so: 2⁻²⁴·sc can still serve."""
    stored = jnp.minimum((d * unit).astype(jnp.float16).astype(jnp.float32), F16_MAX)
    return jnp.where(d > 0, jnp.maximum(stored, 2.0**-24), 0.0) / unit


def _best(errors: Sequence[Array], *choices: Sequence[Array]) -> tuple[Array, ...]:
    """Of each of `choices` the element with the least error; the first of equals."""
    best = (errors[0], *(c[0] for c in choices))
    for new in zip(errors[1:], *(c[1:] for c in choices), strict=True):
        better = new[0] < best[0]
        best = tuple(jnp.where(better, a, b) for a, b in zip(new, best, strict=True))
    return best[1:]


def _grouped(blocks: Blocks, importance: Blocks | None, layout: Layout) -> _Groups:
    shape = (layout.groups, 256 // layout.groups, blocks.shape[-1])
    unit = unit_of(blocks)
    x = (blocks * (1 / unit)[None]).reshape(shape)
    if importance is None:
        w, W = None, jnp.full((shape[0], shape[2]), float(shape[1]))
        c = jnp.sum(x, axis=1) / shape[1]
        z = wz = x - c[:, None]
    else:
        # Columns without importance keep a little, so that a group of them still gets codes.
        scale = jnp.max(importance, axis=0, keepdims=True)
        w = (jnp.where(scale > 0, importance * _inverse(scale), 1.0) + 1e-9).reshape(shape)
        W = jnp.sum(w, axis=1)
        c = jnp.sum(w * x, axis=1) / W
        z = x - c[:, None]
        wz = w * z
    return _Groups(z, w, wz, W, c, jnp.min(z, axis=1), jnp.max(z, axis=1), unit)


def _coded(g: _Groups, inverse: Array, code_of_mean: Array, layout: Layout) -> _Moments:
    """Codes of scale 1/inverse that put the mean c at code_of_mean, a real number; their moments."""
    q = _limited(g.z * inverse[:, None] + code_of_mean[:, None], layout.q_max)
    near = _limited(code_of_mean, layout.q_max)
    q = q - near[:, None]  # so that what dominates a group adds nothing to the sums
    wq = q if g.w is None else g.w * q
    Q, QQ, C = jnp.sum(wq, axis=1), jnp.sum(wq * q, axis=1), jnp.sum(g.wz * q, axis=1)
    mean = Q / g.W
    V = QQ - Q * mean
    V = jnp.where(V > 1e-6 * QQ, V, 0.0)
    return _Moments(near + mean, V, C * _inverse(V))


def _recoded(g: _Groups, s: Array, o: Array, layout: Layout) -> _Moments:
    inverse = _inverse(s)
    return _coded(g, inverse, (g.c - o) * inverse, layout)


def _least_squares(g: _Groups, moments: _Moments) -> tuple[Array, Array, Array]:
    """s ≥ 0 and o ≤ 0 that minimise (1), and (1) there without Σ w z². All [groups, n]."""
    mean, V, s = moments
    o = g.c - s * mean
    # Where the free offset is positive the best has o = 0: one scale for codes and mean together.
    s = jnp.where(o > 0, (V * s + g.W * mean * g.c) * _inverse(V + g.W * mean * mean), s)
    s = jnp.maximum(s, 0.0)
    o = jnp.minimum(jnp.where(s > 0, o, g.c), 0.0)
    return s, o, _error(g, moments, s, o) - V * moments.slope * moments.slope


def _error(g: _Groups, moments: _Moments, s: Array, o: Array) -> Array:
    """The part of (1) that depends on s and o."""
    off = s * moments.mean + o - g.c
    steep = s - moments.slope
    return g.W * off * off + moments.V * steep * steep


def _fit_groups(g: _Groups, layout: Layout) -> tuple[Array, Array, _Moments]:
    """Real scales and offsets: the best least squares of all starts, once more rounded and fitted."""
    low = jnp.minimum(g.low, -g.c)  # o ≤ 0: the range reaches down to zero at least
    width = _inverse(g.high - low)
    fits = []
    for extra, left in layout.starts:
        inverse = (layout.q_max + extra) * width
        fits.append(_least_squares(g, _coded(g, inverse, -low * inverse - left, layout)))
    scales, offsets, errors = map(list, zip(*fits, strict=True))
    s, o = _best(errors, scales, offsets)
    moments = _recoded(g, s, o, layout)
    s, o, _ = _least_squares(g, moments)
    return s, o, moments


def _fit_step(values: Array, weights: Array, unit: Array, layout: Layout) -> Array:
    """A step t ≥ 0 [n], float16, whose whole multiples k·t come near the values [groups, n] ≥ 0.

    For given k the best t = Σ w k v / Σ w k²; k follows from the guesses in `tops`.
    """
    values, weights = values[None], weights[None]
    tops = jnp.array(layout.tops, jnp.float32)[:, None, None]
    k = _limited(values * (tops * _inverse(jnp.max(values, axis=1))[None]), layout.sc_max)
    wk = weights * k
    t = _storable(jnp.sum(wk * values, axis=1) * _inverse(jnp.sum(wk * k, axis=1)), unit[None])  # [tops, n]
    off = t[:, None] * k - values
    return _best(list(jnp.sum(weights * off * off, axis=1)), list(t))[0]


def _nearest_integers(
    g: _Groups, moments: _Moments, d: Array, dmin: Array, layout: Layout
) -> tuple[Array, ...]:
    """sc and m [groups, n] for given codes: of the two sc about the real one, each with its best m."""
    s, _, _ = _least_squares(g, moments)
    below = jnp.floor(s * _inverse(d)[None])
    per_dmin = _inverse(dmin)[None]
    errors, scs, ms = [], [], []
    for sc in (below, below + 1):
        sc = jnp.clip(sc, 0.0, float(layout.sc_max))
        s = d[None] * sc
        m = _limited((s * moments.mean - g.c) * per_dmin, layout.sc_max)
        errors.append(_error(g, moments, s, -dmin[None] * m))
        scs.append(sc)
        ms.append(m)
    return _best(errors, scs, ms)


def _refit(
    g: _Groups, moments: _Moments, steps: tuple[Array, Array], sc: Array, m: Array
) -> tuple[Array, ...]:
    """d and dmin [n], float16, that minimise the sum of (1) over the groups for given codes, sc and m.

    That is Σ W (d a − dmin m − c)² + V (d sc − slope)² with a = sc q̄. dmin is eliminated by projection on
    m; normal equations would lose a group that dominates. The former `steps` stay where rounding to
    float16 costs more than was won.
    """
    mean, V, slope = moments
    a = sc * mean
    wm = g.W * m
    per_mm = _inverse(jnp.sum(wm * m, axis=0))
    a_on_m, c_on_m = jnp.sum(wm * a, axis=0) * per_mm, jnp.sum(wm * g.c, axis=0) * per_mm

    def solve(a: Array, c: Array) -> Array:
        top = jnp.sum(g.W * a * c + V * sc * slope, axis=0)
        return jnp.maximum(top * _inverse(jnp.sum(g.W * a * a + V * sc * sc, axis=0)), 0.0)

    d = solve(a - a_on_m[None] * m, g.c - c_on_m[None] * m)
    d = jnp.where(d * a_on_m < c_on_m, solve(a, g.c), d)  # dmin would be negative: it is 0
    d = _storable(d, g.unit)
    dmin = _storable(jnp.maximum(d * a_on_m - c_on_m, 0.0), g.unit)

    def total(d: Array, dmin: Array) -> Array:
        return jnp.sum(_error(g, moments, d[None] * sc, -dmin[None] * m), axis=0)

    return _best([total(d, dmin), total(*steps)], [d, steps[0]], [dmin, steps[1]])


def fit(blocks: Blocks, importance: Blocks | None, layout: Layout) -> Scales:
    """Search d, dmin, sc and m for the least Σ w (x − x̂)²; importance None is w = 1.

    1. Each group for itself: least squares for the codes of several starts, the best one's codes rounded
       again.
    2. d, then dmin, as steps whose multiples come near the groups' scales and offsets.
    3. Codes for these; sc and m for the codes, jointly; d and dmin for all by least squares.
    """
    g = _grouped(blocks, importance, layout)
    s, o, moments = _fit_groups(g, layout)
    # What an error of s costs: a free offset makes up for the mean's share.
    curvature = moments.V + jnp.where(o < 0, 0.0, g.W * moments.mean * moments.mean)
    d = _fit_step(s, curvature, g.unit, layout)
    sc = _limited(s * _inverse(d)[None], layout.sc_max)
    offsets = jnp.maximum(d[None] * sc * moments.mean - g.c, 0.0)
    dmin = _fit_step(offsets, g.W, g.unit, layout)
    m = _limited(offsets * _inverse(dmin)[None], layout.sc_max)

    moments = _recoded(g, d[None] * sc, -dmin[None] * m, layout)
    sc, m = _nearest_integers(g, moments, d, dmin, layout)
    d, dmin = _refit(g, moments, (d, dmin), sc, m)
    return Scales(d * g.unit, dmin * g.unit, sc.astype(jnp.uint8), m.astype(jnp.uint8))


def assign(blocks: Blocks, importance: Blocks | None, scales: Scales, layout: Layout) -> Codes:
    """The nearest code: importance cannot change it. Where the scale is 0 so is the code."""
    s, dmin_m = _steps(scales)
    inverse = _inverse(s)
    x = blocks.reshape(len(s), -1, blocks.shape[-1])

    def group(step: tuple[Array, Array, Array]) -> Array:
        x, inverse, zero = step
        return _limited(x * inverse[None] + zero[None], layout.q_max).astype(jnp.uint8)

    # A loop, since its result is an array: fused into `pack`, every code would be computed several times.
    return lax.map(group, (x, inverse, dmin_m * inverse)).reshape(blocks.shape)


def reconstruct(codes: Codes, scales: Scales) -> Blocks:
    """d·sc·q − dmin·m. All products are exact in float32, so there is only one rounding, as in C."""
    s, dmin_m = _steps(scales)
    q = codes.reshape(len(s), -1, codes.shape[-1]).astype(jnp.float32)
    return (s[:, None] * q - dmin_m[:, None]).reshape(codes.shape)


def _steps(scales: Scales) -> tuple[Array, Array]:
    """d·sc and dmin·m, [groups, n]."""
    d, dmin, sc, m = scales
    return d[None] * sc.astype(jnp.float32), dmin[None] * m.astype(jnp.float32)


def pack_6_bit(sc: Array, m: Array) -> Array:
    """sc and m, uint8 [8, n] below 64 → [12, n], for Q4_K and Q5_K.

    Bytes 0–3: sc[j] | high bits of sc[j + 4]; 4–7: the same of m; 8–11: low nibbles of sc[j + 4], m[j + 4].
    """
    low = (sc[4:] & 15) | (m[4:] & 15) << 4
    return jnp.concatenate([sc[:4] | sc[4:] >> 4 << 6, m[:4] | m[4:] >> 4 << 6, low])


def unpack_6_bit(data: Array) -> tuple[Array, Array]:
    """The inverse of `pack_6_bit`."""
    sc, m, low = jnp.split(data, 3)
    return (
        jnp.concatenate([sc & 63, (low & 15) | sc >> 6 << 4]),
        jnp.concatenate([m & 63, low >> 4 | m >> 6 << 4]),
    )


def unpack_d_dmin(data: Array) -> tuple[Array, Array]:
    """Four bytes [4, n], two little-endian float16 → d and dmin, float32 [n]."""
    return f16_from_bytes(data[:2]), f16_from_bytes(data[2:])


def tops(first: float, last: float, count: int) -> tuple[float, ...]:
    """Evenly spaced guesses for `Layout.tops`."""
    return tuple(np.linspace(first, last, count).tolist())
