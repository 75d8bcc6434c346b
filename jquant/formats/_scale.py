"""Searching scales of formats whose weights are x̂ = d · sc · q: Q3_K and Q6_K.

A superblock of 256 weights shares d (float16); each group of 16 has an integer scale sc; q are the codes.

For codes q of one group, the best real scale is s = A / B with A = Σ w x q and B = Σ w q²; it leaves the
error Σ w x² − A² / B. So a candidate costs two sums, and the one with the largest gain A² / B wins.
Arrays are [groups, 16, n] for weights and [groups, n] for scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int8

from jquant.formats._blocks import F16_MAX, f16_round, zeros_along

Scales = tuple[Float[Array, " n"], Int8[Array, "runs n"]]  # d, sc
GROUP = 16  # weights that share an integer scale
F16_TINY = 2.0**-24  # the smallest positive float16: a smaller d would erase its superblock
SMALLEST = 1e-37  # its inverse is finite
LEAST_IMPORTANCE = 2.0**-60
TIE = 1 + 2.0**-21  # gains nearer than float32 can tell: the first trial wins, in each group alike


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


def total(x: Array) -> Array:
    """The sum along the second-last axis, whose length is a power of two, by adding halves."""
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = x[..., :half, :] + x[..., half:, :]
    return x[..., 0, :]


def totals(x: Array, y: Array) -> tuple[Array, Array]:
    """Two sums along the second-last axis in one pass over what x and y are made of."""
    zero = np.float32(0)
    return lax.reduce((x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (x.ndim - 2,))


def at_largest(keys: Array, values: Array, axis: int = -2) -> tuple[Array, Array]:
    """The largest key along an axis, and the value beside it."""

    def larger(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        keep = a[0] >= b[0]
        return jnp.where(keep, a[0], b[0]), jnp.where(keep, a[1], b[1])

    return lax.reduce((keys, values), (-np.float32(np.inf), np.float32(0)), larger, (axis % keys.ndim,))


def trial_axis(values: Sequence[float] | range) -> Array:
    """[trial, 1, 1], to vary beside groups and blocks."""
    return jnp.asarray(values, jnp.float32)[:, None, None]


def inverse(s: Array) -> Array:
    """1 / s, and 0 where s is next to 0: a group without scale gets zero codes, never NaN."""
    return 1 / jnp.where(jnp.abs(s) < SMALLEST, jnp.inf, s)


def grouped(blocks: Array, importance: Array | None, limits: Limits) -> tuple[Array, Array | None]:
    """[256, n] → [16, 16, n]: weights that d can reach; importance relative to the superblock's largest.

    So squares stay finite and the size of importance does not matter. None is 0, for then even a weight
    that does not matter is rounded to something near it.
    """
    reach = -F16_MAX * limits.sc_min * -limits.q_min
    shape = (-1, GROUP, blocks.shape[-1])
    x = jnp.clip(blocks, -reach, reach).reshape(shape)
    if importance is None:
        return x, None
    w = importance * inverse(jnp.max(importance, axis=0, keepdims=True))
    return x, jnp.maximum(w, LEAST_IMPORTANCE).reshape(shape)


def nearest_codes(x: Array, s: Array, limits: Limits) -> Array:
    """The codes of least error for scales s [groups, n], as float32 [groups, 16, n]."""
    return jnp.clip(jnp.round(x * inverse(s)[:, None]), limits.q_min, limits.q_max)


def weighted(w: Array | None, x: Array) -> Array:
    return x if w is None else w * x


def moments(x: Array, w: Array | None, q: Array) -> tuple[Array, Array]:
    """A = Σ w x q and B = Σ w q² of each group."""
    wq = weighted(w, q)
    return totals(wq * x, wq * q)


def error(x: Array, w: Array | None, s: Array, limits: Limits) -> Array:
    """Σ w (x − s q)² of each group, with the best codes for s."""
    rest = x - s[:, None] * nearest_codes(x, s, limits)
    return total(weighted(w, rest * rest))


def heaviest(x: Array, w: Array | None) -> Array:
    """The weight of each group whose loss would cost most: the largest w x²."""
    return at_largest(weighted(w, x * x), x)[1]


def fit_groups(x: Array, w: Array | None, trials: Array, limits: Limits) -> GroupFit:
    """The best of the scales tried, [trial, groups, n], each refitted to the codes that it gives."""

    def step(best: GroupFit, trial: Array) -> tuple[GroupFit, None]:
        A, B = moments(x, w, nearest_codes(x, trial, limits))
        scale = A * inverse(B)
        better = A * scale > TIE * best.gain
        fit = GroupFit(scale, A * scale, B)
        return GroupFit(*(jnp.where(better, *pair) for pair in zip(fit, best, strict=True))), None

    zero = zeros_along(trials[0])
    return lax.scan(step, GroupFit(trials[0], zero, zero), trials)[0]


def storable(d: Array) -> Array:
    """d as float16 holds it: finite, and 0 only where d is 0."""
    rounded = f16_round(jnp.clip(d, -F16_MAX, F16_MAX))
    return jnp.where(rounded == 0, jnp.sign(d) * F16_TINY, rounded)


def nearest_sc(s: Array, d: Array, limits: Limits) -> Array:
    """The integer scales nearest to real scales s [groups, n], as float32."""
    return jnp.clip(jnp.round(s * inverse(d)), limits.sc_min, limits.sc_max)


def refit(x: Array, w: Array | None, d: Array, sc: Array, limits: Limits) -> Array:
    """The best d for the codes that (d, sc) gives. Error is a parabola in d: the nearest float16 is best."""
    A, B = moments(x, w, nearest_codes(x, d[None] * sc, limits))
    A, B = totals(A * sc, B * sc * sc)
    return jnp.where(B < SMALLEST, d, storable(A * inverse(B)))


def refine(x: Array, w: Array | None, d: Array, sc: Array, limits: Limits) -> Array:
    """The best of sc − 1, sc and sc + 1 for each group, by true error."""
    trials = jnp.clip(jnp.stack([sc, sc - 1, sc + 1]), limits.sc_min, limits.sc_max)
    errors = lax.map(lambda s: error(x, w, s, limits), d[None, None] * trials)
    return at_largest(-errors, trials, axis=0)[1]


def assign(blocks: Array, importance: Array | None, scales: Scales, limits: Limits) -> Int8[Array, "B n"]:
    """Rounding to nearest is optimal for given scales, whatever the importance."""
    d, sc = scales
    reach = -F16_MAX * limits.sc_min * -limits.q_min
    x = jnp.clip(blocks, -reach, reach).reshape(len(sc), -1, blocks.shape[-1])
    q = nearest_codes(x, d[None] * sc.astype(jnp.float32), limits)
    return q.astype(jnp.int8).reshape(blocks.shape)


def reconstruct(codes: Int8[Array, "B n"], scales: Scales) -> Float[Array, "B n"]:
    """d · sc · q, which has at most 24 significant bits: no rounding, in any order."""
    d, sc = scales
    q = codes.astype(jnp.float32).reshape(len(sc), -1, codes.shape[-1])
    return ((d[None] * sc.astype(jnp.float32))[:, None] * q).reshape(codes.shape)
