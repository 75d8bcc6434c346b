"""Searching scales of formats whose weights are x̂ = d · sc · q: Q3_K and Q6_K.

A superblock of 256 weights shares d (float16); each group of 16 has an integer scale sc; q are the codes.

For codes q of one group, the best real scale is s = A / B with A = Σ w x q and B = Σ w q²; it leaves the
error Σ w x² − A² / B. So a candidate costs two sums, and the one with the largest gain A² / B wins.
Arrays are [groups, 16, n] for weights and [groups, n] for scales; sums and maxima are trees of halves,
which vectorise along n and add in one order on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jquant.formats._blocks import f16_round

GROUP = 16  # weights that share an integer scale
F16_MAX = 65504.0
F16_TINY = 2.0**-24  # the smallest positive float16: a smaller d would erase its superblock
SMALLEST = 1e-30  # far below any scale that float16 holds, and its inverse is finite


class Limits(NamedTuple):
    """The integers that a format can hold."""

    q_min: int
    q_max: int
    sc_min: int
    sc_max: int


class GroupFit(NamedTuple):
    """The best real scale of each group, [groups, n]."""

    scale: Array  # A / B
    gain: Array  # A² / B: the error that the group is spared
    curvature: Array  # B: the error of another scale s is larger by B (s − scale)²


def halved(x: Array, combine: Callable[[Array, Array], Array] = jnp.add) -> Array:
    """Reduce the second-last axis, whose length is a power of two, by combining halves."""
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = combine(x[..., :half, :], x[..., half:, :])
    return x[..., 0, :]


def keep_largest(keys: Array, values: Array) -> Array:
    """values [..., k, n] where keys are largest along k, a power of two: [..., n]."""
    while keys.shape[-2] > 1:
        half = keys.shape[-2] // 2
        first = keys[..., :half, :] >= keys[..., half:, :]
        keys, values = (jnp.where(first, a[..., :half, :], a[..., half:, :]) for a in (keys, values))
    return values[..., 0, :]


def inverse(s: Array) -> Array:
    """1 / s, and 0 where s is next to 0: a group without scale gets zero codes, never NaN."""
    return jnp.where(jnp.abs(s) < SMALLEST, 0.0, 1 / s)


def grouped(blocks: Array, importance: Array | None, limits: Limits) -> tuple[Array, Array | None]:
    """[256, n] → [16, 16, n]; weights within what d can reach, importance of at most 1 per superblock.

    Both keep the squares finite. A superblock without any importance is treated as equally important.
    """
    n = blocks.shape[-1]
    reach = -F16_MAX * limits.sc_min * -limits.q_min
    x = jnp.clip(blocks, -reach, reach).reshape(-1, GROUP, n)
    if importance is None:
        return x, None
    largest = halved(importance, jnp.maximum)
    w = jnp.where(largest < SMALLEST, 1.0, importance * inverse(largest))
    return x, w.reshape(-1, GROUP, n)


def nearest_codes(x: Array, s: Array, limits: Limits) -> Array:
    """The codes of least error for scales s [groups, n], as float32 [groups, 16, n]."""
    return jnp.clip(jnp.round(x * inverse(s)[:, None]), limits.q_min, limits.q_max)


def weighted(w: Array | None, x: Array) -> Array:
    return x if w is None else w * x


def sums(x: Array, w: Array | None, q: Array) -> tuple[Array, Array]:
    """A = Σ w x q and B = Σ w q² of each group."""
    wq = weighted(w, q)
    return halved(wq * x), halved(wq * q)


def error(x: Array, w: Array | None, s: Array, limits: Limits) -> Array:
    """Σ w (x − s q)² of each group, with the best codes for s."""
    rest = x - s[:, None] * nearest_codes(x, s, limits)
    return halved(weighted(w, rest * rest))


def heaviest(x: Array, w: Array | None) -> Array:
    """The weight of each group whose loss would cost most: the largest w x²."""
    return keep_largest(weighted(w, x * x), x)


def fit_groups(
    x: Array, w: Array | None, limits: Limits, candidate: Callable[[Array], Array], count: int
) -> GroupFit:
    """The best of `count` scales, each refitted to the codes that it gives. candidate(i): [groups, n]."""

    def step(i: Array, best: GroupFit) -> GroupFit:
        A, B = sums(x, w, nearest_codes(x, candidate(i), limits))
        scale = A * inverse(B)
        better = A * scale > best.gain
        return GroupFit(*(jnp.where(better, *pair) for pair in zip((scale, A * scale, B), best, strict=True)))

    zero = jnp.zeros_like(x[:, 0])
    return lax.fori_loop(0, count, step, GroupFit(candidate(jnp.int32(0)), zero, zero))


def storable(d: Array) -> Array:
    """d as float16 holds it: finite, and 0 only where d is 0."""
    rounded = f16_round(jnp.clip(d, -F16_MAX, F16_MAX))
    return jnp.where(rounded == 0, jnp.sign(d) * F16_TINY, rounded)


def nearest_sc(s: Array, d: Array, limits: Limits) -> Array:
    """The integer scales nearest to real scales s [groups, n], as float32."""
    return jnp.clip(jnp.round(s * inverse(d)), limits.sc_min, limits.sc_max)


def refit(x: Array, w: Array | None, d: Array, sc: Array, limits: Limits) -> Array:
    """The best d for the codes that (d, sc) gives. Error is a parabola in d: the nearest float16 is best."""
    A, B = sums(x, w, nearest_codes(x, d * sc, limits))
    A, B = halved(A * sc), halved(B * sc * sc)
    return jnp.where(B < SMALLEST, d, storable(A * inverse(B)))


def refine(x: Array, w: Array | None, d: Array, sc: Array, limits: Limits) -> Array:
    """The best of sc − 1, sc and sc + 1 for each group, by true error."""

    def step(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        trial = jnp.clip(sc + (i - 1).astype(jnp.float32), limits.sc_min, limits.sc_max)
        e = error(x, w, d * trial, limits)
        better = e < best[0]
        return jnp.where(better, e, best[0]), jnp.where(better, trial, best[1])

    return lax.fori_loop(0, 3, step, (jnp.full_like(sc, jnp.inf), sc))[1]
