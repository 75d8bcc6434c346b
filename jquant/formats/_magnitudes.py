"""Codewords of magnitudes with signs: what IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S share.

A lane is what chooses its codewords independently of others: 8 weights, or IQ3_S's 4. With free signs each
weight has its own, and only magnitudes count. Where the number of minuses must be even, a lane whose weights
have an odd one gives one weight the wrong sign, the one that loses least by it: 4 t w |x| v.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.formats import _codebook
from jquant.formats._codebook import Codebook, Rows, Table, codebook
from jquant.formats._codebook_scales import (
    Layout,
    Sums,
    Weights,
    climb,
    ladder,
    looked_up,
    normalised,
    on_lanes,
    over_runs,
    real_scales,
    settle,
    to_lanes,
)

Blocks = Float[Array, "B n"]
Scales = tuple[Float[Array, " n"], Int[Array, "runs n"]]  # d, and s of each run
Codes = tuple[Int[Array, "codewords n"], UInt8[Array, "lanes n"]]  # grid indices, sign bits of each lane

SIGNED = 8  # weights whose signs have a parity

PEAK = (0.8, 0.95, 1.1, 1.3)
TOPS = tuple(float(k) for k in range(33, 14, -2))


def layout(grid: str, *, runs: int, unit: float, rms: tuple[float, float]) -> Layout:
    """rms: between which codeword magnitudes the root mean square of a run is tried to lie."""
    top = max(codebook(grid).levels)
    peak = tuple(top * f for f in PEAK)
    return Layout(grid, runs, unit, k_max=31, tops=TOPS, rms=tuple(np.geomspace(*rms, 4).tolist()), peak=peak)


class _Lanes(NamedTuple):
    """w |x| and w [weights of a lane, lanes]; odd: 1 where a sign must be wrong, else 0; None: free signs."""

    wx: Array
    w: Array
    odd: Array | None


def _lanes(g: Weights, book: Codebook, even_signs: bool) -> _Lanes:
    size = SIGNED if even_signs else book.group
    x, w = to_lanes(g.x, size), to_lanes(g.w, size)
    odd = (jnp.sum(x < 0, axis=0) & 1).astype(jnp.float32) if even_signs else None
    return _Lanes(w * jnp.abs(x), w, odd)


def _gains(book: Codebook, t: Array, wx: Rows, w: Rows) -> list[Table]:
    return _codebook.gains(wx, w, t, book.levels)


def _losses(book: Codebook, t: Array, wx: Rows, odd: Array | float) -> list[Table]:
    """What a wrong sign costs, where there must be one: 4 t w |x| v."""
    return [[v * (4 * t * x * odd) for v in book.levels] for x in wx]


def _with_any_signs(book: Codebook, t: Array, wx: Rows, w: Rows) -> Array:
    return _codebook.nearest(book, _gains(book, t, wx, w))


def _with_even_signs(book: Codebook, t: Array, wx: Rows, w: Rows, odd: Array) -> Array:
    return _codebook.nearest_with_wrong_sign(book, _gains(book, t, wx, w), _losses(book, t, wx, odd))


def _with_right_and_wrong(book: Codebook, t: Array, wx: Rows, w: Rows) -> Array:
    return _codebook.nearest_right_and_wrong(book, _gains(book, t, wx, w), _losses(book, t, wx, 1.0))


def _nearest(book: Codebook, lanes: _Lanes, t: Array) -> Array:
    """The code of each lane, int32, for its scale t."""
    if lanes.odd is None:
        return looked_up(partial(_with_any_signs, book), t, lanes.wx, lanes.w)
    if book.group < SIGNED:
        return _nearest_pair(book, lanes, lanes.odd, t)
    return looked_up(partial(_with_even_signs, book), t, lanes.wx, lanes.w, lanes.odd)


def _nearest_pair(book: Codebook, lanes: _Lanes, odd: Array, t: Array) -> Array:
    """Two codewords of 4, of which one has the wrong sign where the lane must have one."""
    wx, w = (jnp.concatenate(jnp.split(a, 2), axis=1) for a in (lanes.wx, lanes.w))
    halves, both = _Lanes(wx, w, jnp.ones_like(w[0])), jnp.concatenate([t, t])
    codes = looked_up(partial(_with_right_and_wrong, book), both, wx, w)
    size = book.bits * book.group
    right, wrong = codes & (1 << size) - 1, codes >> size

    def gains(lanes: _Lanes, code: Array) -> list[Array]:
        s1, s2 = _sums(book, lanes, code)
        return jnp.split(both * (2 * s1 - both * s2), 2)

    first, second = gains(halves._replace(odd=None), right)
    first_wrong, second_wrong = gains(halves, wrong)
    wrong_first = first_wrong + second > first + second_wrong
    first, second = jnp.split(right, 2)
    first_wrong, second_wrong = jnp.split(wrong, 2)
    first = jnp.where((odd > 0) & wrong_first, first_wrong, first)
    second = jnp.where((odd > 0) & ~wrong_first, second_wrong, second)
    return first | second << size


def _sums(book: Codebook, lanes: _Lanes, code: Array) -> tuple[Array, Array]:
    """S1 and S2 of each lane."""
    v = _codebook.values(book, code, len(lanes.w))
    xv = [wx * v for wx, v in zip(lanes.wx, v, strict=True)]
    s1 = _codebook.total(xv)
    if lanes.odd is not None:
        s1 = s1 - 2 * lanes.odd * _codebook.least(xv)
    return s1, _codebook.total([w * v * v for w, v in zip(lanes.w, v, strict=True)])


def fit(blocks: Blocks, importance: Blocks | None, layout: Layout, even_signs: bool) -> Scales:
    book, g = codebook(layout.grid), normalised(blocks, importance)
    lanes = _lanes(g, book, even_signs)

    def look(lanes: _Lanes, t: Array) -> Sums:
        s1, s2 = _sums(book, lanes, _nearest(book, lanes, on_lanes(t, lanes.w.shape[1])))
        runs, n = t.shape
        return Sums(over_runs(s1, runs, n), over_runs(s2, runs, n))

    # Parity makes every scale worse by much the same, so the ladder need not know of it.
    free = _lanes(g, book, even_signs=False)
    found = climb(partial(look, free), ladder(g, layout))
    return settle(partial(look, lanes), found, g.unit, layout)


def assign(
    blocks: Blocks, importance: Blocks | None, scales: Scales, layout: Layout, even_signs: bool
) -> Codes:
    """The nearest codewords, and signs."""
    book, g = codebook(layout.grid), normalised(blocks, importance)
    lanes, n = _lanes(g, book, even_signs), blocks.shape[1]
    size, total = lanes.w.shape
    code = _nearest(book, lanes, on_lanes(real_scales(*scales, g, layout), total))
    index = _codebook.grid_index(layout.grid, code, size // book.group)  # [codewords of a lane, lanes]
    index = index.reshape(len(index), -1, n).swapaxes(0, 1).reshape(-1, n)
    minus = to_lanes(g.x, size) < 0
    if lanes.odd is not None:
        v = _codebook.values(book, code, size)
        loss = jnp.stack([wx * v for wx, v in zip(lanes.wx, v, strict=True)])
        wrong = jnp.arange(size)[:, None] == jnp.argmin(loss, axis=0)[None]
        minus = minus ^ (wrong & (lanes.odd > 0)[None])
    bit = jnp.left_shift(jnp.uint8(1), jnp.arange(size, dtype=jnp.uint8))[:, None]
    return index, jnp.sum(jnp.where(minus, bit, jnp.uint8(0)), axis=0, dtype=jnp.uint8).reshape(-1, n)
