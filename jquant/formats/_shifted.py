"""Codewords of −1, 0, 1 with a shift of ±⅛: what IQ1_S and IQ1_M share.

A code here is the codeword's, with the bit NEGATIVE above it where the shift is −⅛. Lanes are groups of 8.
Scales and their integers are searched without the codebook, each weight with the nearest of its three levels:
this finds the same ones for a twentieth of the work. The codebook then refits d and, where each group has its
own shift, chooses the shifts once more.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.formats import _codebook
from jquant.formats._blocks import inverse, zeros_along
from jquant.formats._codebook import Rows, codebook
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
    refitted,
    root_mean_square,
    settle,
    to_lanes,
)

Blocks = Float[Array, "B n"]

SHIFT = 0.125
NEGATIVE = 16  # the bit above a codeword's code
GRID = "IQ1_S"  # IQ1_M's is the same
GROUPS = 32
# t tried, relative to the run's root mean square.
FIRST, RATIO, COUNT = 0.42, 1.27, 8


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


def _with_shift(t: Array, wx: Rows, w: Rows, negative: Array) -> Array:
    book = codebook(GRID)
    levels = [level + _shift(negative) for level in book.levels]
    return _codebook.nearest(book, _codebook.gains(wx, w, t, levels)) | negative << NEGATIVE


def _nearest(lanes: _Lanes, t: Array, negative: Array) -> Array:
    """The code of each lane for its scale t and shift."""
    return looked_up(_with_shift, t, lanes.wx, lanes.w, negative)


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


class _Runs(NamedTuple):
    """Weights of a block by run and shift: [run, shift, weight, n], and sums over those of a shift."""

    x: Array
    wx: Array
    w: Array
    sum_wx: Array
    sum_w: Array


def _runs(g: Weights, layout: Layout, shared: int) -> _Runs:
    """`shared` consecutive groups have the same shift."""
    x, w = (a.reshape(layout.runs, -1, 8 * shared, a.shape[1]) for a in (g.x, g.w))
    wx = w * x
    return _Runs(x, wx, w, jnp.sum(wx, axis=2), jnp.sum(w, axis=2))


def _free_gain(r: _Runs, t: Array, shift: float) -> Array:
    """What the nearest levels save with this shift, for t [runs, n]: [run, shift, n].

    A level v saves a v − c v², a = 2 t w x and c = t² w. Beside v = shift, shift ± 1 saves
    ±(a − 2 c shift) − c more: so the best of the three saves max(|a − 2 c shift| − c, 0) more than shift.
    """
    t = t[:, None]
    a, c = 2 * t[:, None] * r.wx, (t * t)[:, None] * r.w
    more = jnp.abs(a - 2 * shift * c) - c
    more = jnp.sum(jnp.where(more > 0, more, 0.0), axis=2)  # jnp.maximum would ask for NaN
    return more + shift * t * (2 * r.sum_wx - shift * t * r.sum_w)


def _free_sums(r: _Runs, negative: Array, t: Array) -> Sums:
    """S1 and S2 of the nearest levels. negative: [run, shift, n], 1 where the shift is −⅛."""
    shift = _shift(negative)[:, :, None]
    v = jnp.clip(jnp.round(r.x * inverse(t)[:, None, None] - shift), -1.0, 1.0) + shift
    return Sums(jnp.sum(r.wx * v, axis=(1, 2)), jnp.sum(r.w * v * v, axis=(1, 2)))


def _best_of_ladder(r: _Runs, rms: Array) -> Array:
    """The t [runs, n] at which the nearest levels save most, each group with its better shift."""

    def step(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        trial, gain, t = best
        both = [_free_gain(r, trial, SHIFT), _free_gain(r, trial, -SHIFT)]
        new = jnp.sum(_codebook.largest(both), axis=1)
        return trial * RATIO, jnp.maximum(new, gain), jnp.where(new > gain, trial, t)

    zero = zeros_along(rms)
    return lax.fori_loop(0, COUNT, step, (rms * FIRST, zero - 1, zero))[2]


def fit(
    blocks: Blocks, importance: Blocks | None, layout: Layout, shared: int
) -> tuple[Float[Array, " n"], Int[Array, "runs n"], Int[Array, "shifts n"]]:
    """(d, s, 1 where the shift of `shared` groups is negative)."""
    g, n = normalised(blocks, importance), blocks.shape[1]
    r = _runs(g, layout, shared)
    t = _best_of_ladder(r, root_mean_square(g, layout.runs))
    negative = (_free_gain(r, t, -SHIFT) > _free_gain(r, t, SHIFT)).astype(jnp.int32)
    look = partial(_free_sums, r, negative)
    sums = look(t)
    t = jnp.where(sums.s1 > 0, sums.s1 * inverse(sums.s2), t)
    d, s = settle(look, Found(zeros_along(t), t, sums), g.unit, layout)

    lanes, negative = _lanes(g), negative.reshape(-1, n)
    t = on_lanes(real_scales(d, s, g, layout), GROUPS * n)
    of_lanes = _sums(lanes, _nearest(lanes, t, on_lanes(negative, GROUPS * n)))
    sums = Sums(*(over_runs(a, layout.runs, n) for a in of_lanes))
    return refitted(sums, (2 * s + 1).astype(jnp.float32), g.unit, layout), s, negative


def assign(
    blocks: Blocks,
    importance: Blocks | None,
    scales: tuple[Float[Array, " n"], Int[Array, "runs n"]],
    layout: Layout,
    negative: Int[Array, "runs n"] | None = None,
) -> tuple[Int[Array, "groups n"], Int[Array, "groups n"]]:
    """Grid index of each group, and 1 where its shift is negative; the better shift where none is given."""
    g, n = normalised(blocks, importance), blocks.shape[1]
    lanes = _lanes(g)
    groups = len(blocks) // 8
    t = on_lanes(real_scales(*scales, g, layout), groups * n)
    fixed = None if negative is None else on_lanes(negative, groups * n)
    code = _better_shift(lanes, t) if fixed is None else _nearest(lanes, t, fixed)
    index = _codebook.grid_index(GRID, code & (1 << NEGATIVE) - 1, 1)
    return index.reshape(groups, n), (code >> NEGATIVE).reshape(groups, n)
