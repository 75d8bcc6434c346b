"""Encoding to a few fixed levels, x̂ = d · level[q], with the least weighted squared error Σ w (x − x̂)².

With the codes of a scale c, S1 = Σ w x level[q] and S2 = Σ w level[q]², the error of a scale s is
Σ w x² − (2 s S1 − s² S2). The bracket is the **gain** of s; it is largest at s = S1 / S2, where it is
S1² / S2. So the scale is found by trying a ladder of them and then alternating between the two closed
forms: nearest codes for the scale, best scale for the codes. Neither step can lower the gain.

Arrays are [..., B, n] with sums over the B weights of a block, in float32. x and w are relative to the
largest of their block, so that no sum leaves its range. `levels` ascend.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax.numpy as jnp
from jax import Array, lax

from jquant.formats._blocks import inverse, storable, zeros_along

REFITS = 2


def weights(blocks: Array, importance: Array | None) -> Array:
    """Importance relative to the block's largest; ones where none is known.

    The floor is far below any effect on the weights that matter, and lets those that do not (columns that
    calibration never reached) still get sensible values when nothing else decides.
    """
    if importance is None:
        return jnp.ones_like(blocks)
    return jnp.maximum(importance * inverse(jnp.max(importance, axis=0, keepdims=True)), 1e-9)


def signed_peak(x: Array) -> Array:
    """The value of largest magnitude: [..., B, n] → [..., 1, n]."""
    largest, smallest = jnp.max(x, axis=-2, keepdims=True), jnp.min(x, axis=-2, keepdims=True)
    return jnp.where(largest > -smallest, largest, smallest)


def nearest_level(t: Array, levels: Sequence[float]) -> Array:
    """The level nearest to t, as a sum of steps: no table is gathered from, so it vectorises anywhere."""
    value = jnp.full_like(t, levels[0])
    for below, above in pairwise(levels):
        value = value + jnp.where(t > (below + above) / 2, above - below, 0.0)
    return value


def nearest_code(x: Array, d: Array, levels: Sequence[float]) -> Array:
    """argmin |x − d · level|, int32, and the code of the level nearest to 0 where d is 0.

    x is compared with d times the midpoints, which are exact products, so this is the nearest code even
    where 1/d has no float32. d is [..., 1, n].
    """
    size, turned = jnp.abs(d), jnp.where(d < 0, -x, x)
    code = jnp.zeros(x.shape, jnp.int32)
    for below, above in pairwise(levels):
        code = code + (turned > size * ((below + above) / 2)).astype(jnp.int32)
    zero = min(range(len(levels)), key=lambda k: abs(levels[k]))
    return jnp.where(size == 0, zero, code)


def moments(x: Array, w: Array, scale: Array, levels: Sequence[float]) -> tuple[Array, Array]:
    """(S1, S2) [..., 1, n] of the nearest codes for a scale [..., 1, n]."""
    q = nearest_level(x * inverse(scale), levels)
    wq = w * q
    return jnp.sum(wq * x, axis=-2, keepdims=True), jnp.sum(wq * q, axis=-2, keepdims=True)


def gain(scale: Array, s1: Array, s2: Array) -> Array:
    return scale * (2 * s1 - scale * s2)


def search_scale(x: Array, w: Array, levels: Sequence[float], ladder: Array) -> tuple[Array, Array]:
    """The best scale of a ladder [steps, ..., 1, n], refitted, and its gain: both [..., 1, n]."""

    def better(scale: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        s1, s2 = moments(x, w, scale, levels)
        refitted = s1 * inverse(s2)
        return (
            jnp.where(refitted * s1 > best[1], refitted, best[0]),
            jnp.maximum(refitted * s1, best[1]),
        )

    zero = zeros_along(x[..., :1, :])  # [..., 1, n]
    best = (zero, zero)
    best = lax.fori_loop(0, len(ladder), lambda k, best: better(ladder[k], best), best)
    return lax.fori_loop(0, REFITS, lambda _, best: better(best[0], best), best)


def fit_scale(
    blocks: Array, importance: Array | None, levels: Sequence[float], ladder: Sequence[float]
) -> Array:
    """d [n], a float16 value, of blocks [B, n] with one scale.

    ladder: scales to try, relative to the weight of largest magnitude, whose sign they take.
    """
    peak = signed_peak(blocks)
    x, w = blocks * inverse(peak), weights(blocks, importance)
    scales = jnp.asarray(ladder, jnp.float32)[:, None, None] * jnp.ones_like(peak)[None]
    return storable(search_scale(x, w, levels, scales)[0] * peak)[0]
