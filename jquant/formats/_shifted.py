"""Codewords of −1, 0, 1 with a shift of ±⅛: what IQ1_S and IQ1_M share.

A code here is the codeword's, with the bit NEGATIVE above it where the shift is −⅛. Lanes are groups of 8.
The ladder of scales is tried without the codebook, each weight with the nearest of its three levels: this
finds nearly the same scale and shift for a twentieth of the work. The codebook then settles d and the
integers, and, where each group has its own shift, the shifts once more.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.formats import _codebook
from jquant.formats._blocks import zeros_along
from jquant.formats._codebook import codebook
from jquant.formats._codebook_scales import (
    Found,
    Layout,
    Sums,
    Weights,
    looked_up,
    normalised,
    on_lanes,
    over_runs,
    real_scales,
    root_mean_square,
    settle,
    to_lanes,
)

Blocks = Float[Array, "256 n"]

SHIFT = 0.125
NEGATIVE = 16  # the bit above a codeword's code
GRID = "IQ1_S"  # IQ1_M's is the same
GROUPS = 32
# t tried, relative to the run's root mean square.
FIRST, RATIO, COUNT = 0.42, 1.125, 15


def layout(*, runs: int) -> Layout:
    return Layout(GRID, runs, unit=1.0, k_max=15, tops=(16.0, 15.0, 14.0, 13.0, 11.0, 9.0, 7.0))


class _Lanes(NamedTuple):
    """w x and w: [8, lanes]."""

    wx: Array
    w: Array


def _lanes(g: Weights) -> _Lanes:
    x, w = to_lanes(g.x, 8), to_lanes(g.w, 8)
    return _Lanes(w * x, w)


def _shift(negative: Array) -> Array:
    return jnp.where(negative != 0, -SHIFT, SHIFT)


def _nearest(lanes: _Lanes, t: Array, negative: Array) -> Array:
    """The code of each lane for its scale t and shift."""
    book = codebook(GRID)

    def nearest(t: Array) -> Array:
        levels = [level + _shift(negative) for level in book.levels]
        gains = _codebook.gains(lanes.wx, lanes.w, t, levels)
        return _codebook.nearest(book, gains) | negative << NEGATIVE

    return looked_up(nearest, t)


def _sums(lanes: _Lanes, code: Array) -> tuple[Array, Array]:
    """S1 and S2 of each lane."""
    shift = _shift(code >> NEGATIVE)
    v = [v + shift for v in _codebook.values(codebook(GRID), code, 8)]
    xv = [wx * v for wx, v in zip(lanes.wx, v, strict=True)]
    vv = [w * v * v for w, v in zip(lanes.w, v, strict=True)]
    return _codebook.total(xv), _codebook.total(vv)


def _both(lanes: _Lanes, t: Array) -> tuple[Array, Array]:
    """Codes of the positive and of the negative shift, looked up together: [lanes] each."""
    twice = _Lanes(*(jnp.concatenate([a, a], axis=1) for a in lanes))
    negative = jnp.arange(2 * len(t), dtype=jnp.int32) // len(t)
    positive, negative = jnp.split(_nearest(twice, jnp.concatenate([t, t]), negative), 2)
    return positive, negative


def _better_shift(lanes: _Lanes, t: Array) -> Array:
    """The code of the better shift for each lane."""
    codes = _both(lanes, t)

    def gain(code: Array) -> Array:
        s1, s2 = _sums(lanes, code)
        return t * (2 * s1 - t * s2)

    return jnp.where(gain(codes[1]) > gain(codes[0]), codes[1], codes[0])


class _Start(NamedTuple):
    t: Array  # [runs, n]
    negative: Array  # [shifts, n], 1 where the better shift is −⅛


def _unconstrained(g: Weights, layout: Layout, shared: int) -> _Start:
    """The best t of the ladder for each run if every combination of levels were a codeword.

    `shared` consecutive groups have the same shift.
    """
    n = g.x.shape[1]
    x, w = (a.reshape(layout.runs, -1, 8 * shared, n) for a in (g.x, g.w))  # [run, shift, weight, n]
    wx = w * x

    def saved(t: Array, shift: float) -> Array:
        """The gain of each shift: [run, shift, n]."""
        t = t[:, None, None]
        slope, curvature = 2 * t * wx, t * t * w
        gains = [v * (slope - v * curvature) for v in (shift - 1, shift, shift + 1)]
        return jnp.sum(_codebook.largest(gains), axis=2)

    def step(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        trial, gain, t = best
        new = jnp.sum(_codebook.largest([saved(trial, SHIFT), saved(trial, -SHIFT)]), axis=1)
        return trial * RATIO, jnp.maximum(new, gain), jnp.where(new > gain, trial, t)

    rms = root_mean_square(g, layout.runs)
    zero = zeros_along(rms)
    t = lax.fori_loop(0, COUNT, step, (rms * FIRST, zero - 1, zero))[2]
    negative = saved(t, -SHIFT) > saved(t, SHIFT)
    return _Start(t, negative.astype(jnp.int32).reshape(-1, n))


def fit(
    blocks: Blocks, importance: Blocks | None, layout: Layout, shared: int
) -> tuple[Float[Array, " n"], Int[Array, "runs n"], Int[Array, "shifts n"]]:
    """(d, s, 1 where the shift of `shared` groups is negative)."""
    g, n = normalised(blocks, importance), blocks.shape[1]
    lanes, runs = _lanes(g), layout.runs
    start = _unconstrained(g, layout, shared)
    negative = on_lanes(start.negative, GROUPS * n)

    def look(t: Array) -> Sums:
        s1, s2 = _sums(lanes, _nearest(lanes, on_lanes(t, GROUPS * n), negative))
        return Sums(over_runs(s1, runs, n), over_runs(s2, runs, n))

    # Σ w stands in for the curvature S2, since v is near ±1.
    zero, curvature = zeros_along(start.t), jnp.sum(g.w.reshape(runs, -1, n), axis=1)
    d, s = settle(look, Found(zero, start.t, Sums(zero, curvature)), g.unit, layout)
    return d, s, start.negative


def assign(
    blocks: Blocks,
    importance: Blocks | None,
    scales: tuple[Float[Array, " n"], Int[Array, "runs n"]],
    layout: Layout,
    negative: Int[Array, "runs n"] | None = None,
) -> tuple[Int[Array, "32 n"], Int[Array, "32 n"]]:
    """Grid index of each group, and 1 where its shift is negative; the better shift where none is given."""
    g, n = normalised(blocks, importance), blocks.shape[1]
    lanes = _lanes(g)
    t = on_lanes(real_scales(*scales, g, layout), GROUPS * n)
    fixed = None if negative is None else on_lanes(negative, GROUPS * n)
    code = _better_shift(lanes, t) if fixed is None else _nearest(lanes, t, fixed)
    index = _codebook.grid_index(GRID, code & (1 << NEGATIVE) - 1, 1)
    return index.reshape(GROUPS, n), (code >> NEGATIVE).reshape(GROUPS, n)
