"""The scales of the types with a codebook: w ≈ d · unit · k · v, k odd, v a codeword with signs or shift.

Terms, beside those of `_codebook`
    lane        the weights that choose their codeword independently of others: [weights of a lane, lanes]
    run         the consecutive lanes that share k: 32 or 16 weights; a scale per run is [runs, n]
    t           the real scale of a run, for d · unit · k
    look        t → the nearest codewords for it, as their sums S1 = Σ w x v and S2 = Σ w v² over a run

What given codewords save of a run's Σ w x², their gain, is t (2 S1 − t S2): a parabola, with S1² / S2 at its
top t = S1 / S2. Nearest codewords for t, and best t for codewords, alternate; neither can lower the gain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jquant.core import on_cuda
from jquant.formats._blocks import inverse, storable, unit_of, zeros_along
from jquant.formats._lane_kernel import over_lanes
from jquant.formats._levels import weights


class Layout(NamedTuple):
    """What tells the types apart, and how far the search goes."""

    grid: str
    runs: int  # in a block
    unit: float
    k_max: int
    tops: tuple[float, ...]  # d tried: the largest t divided by these
    rms: tuple[float, ...] = ()  # codeword magnitudes on which a run's root mean square is tried to lie
    peak: tuple[float, ...] = ()  # the same for its largest weight


class Weights(NamedTuple):
    """x [256, n] in units of a power of two near the block's largest; w relative to the largest."""

    x: Array
    w: Array
    unit: Array  # [n]


class Sums(NamedTuple):
    """S1 and S2 of the codewords looked up, [runs, n]."""

    s1: Array
    s2: Array


class Found(NamedTuple):
    gain: Array  # [runs, n], as scale, which is t or k
    scale: Array
    sums: Sums


Look = Callable[[Array], Sums]


def normalised(blocks: Array, importance: Array | None) -> Weights:
    unit = unit_of(blocks)
    return Weights(blocks * (1 / unit)[None], weights(blocks, importance), unit)


def to_lanes(a: Array, size: int) -> Array:
    """[256, n] → [size, lanes], lanes in the order of the file."""
    n = a.shape[-1]
    return a.reshape(-1, size, n).swapaxes(0, 1).reshape(size, -1)


def on_lanes(t: Array, lanes: int) -> Array:
    """[runs, n] → [lanes]: the run's value for each of its lanes."""
    runs, n = t.shape
    return jnp.broadcast_to(t[:, None], (runs, lanes // n // runs, n)).reshape(lanes)


def over_runs(a: Array, runs: int, n: int) -> Array:
    """[lanes] → [runs, n], summed."""
    return jnp.sum(a.reshape(runs, -1, n), axis=1)


def looked_up(nearest: Callable[..., Array], t: Array, *lanes: Array) -> Array:
    """nearest(t, *lanes), int32 [lanes], each lane by itself; or zeros where no lane of the tile has a scale.

    The condition spares tiles of zeros the search. It also keeps it a computation of its own, whose result
    lies in memory: fused with the sums over its codes, the search would be repeated for each term. On a GPU
    it is a kernel.
    """

    def unless_zero(t: Array, *lanes: Array) -> Array:
        none = zeros_along(t).astype(jnp.int32)
        return lax.cond(jnp.any(t > 0), nearest, lambda *_: none, t, *lanes)

    return on_cuda(partial(over_lanes, nearest), unless_zero, t, *lanes)


def real_scales(d: Array, s: Array, g: Weights, layout: Layout) -> Array:
    """t [runs, n] as the file gives it, in the unit of x."""
    return (d * inverse(g.unit) * layout.unit)[None] * (2 * s + 1).astype(jnp.float32)


def ladder(g: Weights, layout: Layout) -> Array:
    """The t to try first: [steps, runs, n].

    The root mean square is weighted by importance. Where that is nearly all in one column, it says nothing of
    the scale that suits the other weights; the largest weight does.
    """
    peak = jnp.max(jnp.abs(g.x).reshape(layout.runs, -1, g.x.shape[1]), axis=1)
    tried = [root_mean_square(g, layout.runs) / v for v in layout.rms] + [peak / v for v in layout.peak]
    return jnp.stack(tried)


def root_mean_square(g: Weights, runs: int) -> Array:
    """Of each run's weights, by importance: [runs, n]."""
    shape = (runs, -1, g.x.shape[1])
    w = g.w.reshape(shape)
    return jnp.sqrt(jnp.sum(w * g.x.reshape(shape) ** 2, axis=1) * inverse(jnp.sum(w, axis=1)))


def _better(new: Found, old: Found) -> Found:
    return jax.tree.map(lambda a, b: jnp.where(new.gain > old.gain, a, b), new, old)


def _nothing(like: Array) -> Found:
    """What every scale is better than."""
    zero = zeros_along(like)
    return Found(zero - jnp.inf, zero, Sums(zero, zero))


def climb(look: Look, ladder: Array) -> Found:
    """The best t of a ladder [steps, runs, n] for each run by itself, refitted to its codewords."""
    steps = len(ladder)

    def step(i: Array, best: Found) -> Found:
        sums = look(jnp.where(i < steps, ladder[jnp.minimum(i, steps - 1)], best.scale))
        s1 = jnp.maximum(sums.s1, 0.0)
        t = s1 * inverse(sums.s2)
        return _better(Found(s1 * t, t, sums), best)

    return lax.fori_loop(0, steps + 1, step, _nothing(ladder[0]))


def settle(look: Look, found: Found, unit: Array, layout: Layout) -> tuple[Array, Array]:
    """d [n] and s [runs, n], k = 2 s + 1, of least error, from each run's best t.

    1. d, as the step whose odd multiples come nearest to these t.
    2. k − 2, k and k + 2 for each run, with the nearest codewords.
    3. d by least squares for all runs' codewords.
    """
    d = _stored(_step(found.scale, found.sums.s2, layout), unit, layout)
    middle = _nearest_odd(found.scale * inverse(d)[None], layout.k_max)

    def neighbour(i: Array, best: Found) -> Found:
        k = jnp.clip(middle + 2 * (i - 1).astype(jnp.float32), 1.0, float(layout.k_max))
        t = d[None] * k
        sums = look(t)
        return _better(Found(t * (2 * sums.s1 - t * sums.s2), k, sums), best)

    _, k, sums = lax.fori_loop(0, 3, neighbour, _nothing(middle))
    return refitted(sums, k, unit, layout), ((k - 1) / 2).astype(jnp.int32)


def refitted(sums: Sums, k: Array, unit: Array, layout: Layout) -> Array:
    """d [n] by least squares for codewords whose runs have these sums and k."""
    d = jnp.sum(k * jnp.maximum(sums.s1, 0.0), axis=0) * inverse(jnp.sum(k * k * sums.s2, axis=0))
    return storable(d * unit / layout.unit)


def _nearest_odd(k: Array, k_max: int) -> Array:
    return jnp.clip(2 * jnp.floor(k / 2) + 1, 1.0, float(k_max))


def _stored(d: Array, unit: Array, layout: Layout) -> Array:
    """d as the file's float16 will give it."""
    return storable(d * unit / layout.unit) * inverse(unit) * layout.unit


def _step(t: Array, curvature: Array, layout: Layout) -> Array:
    """The d [n] whose odd multiples come nearest to t [runs, n]: least Σ c (t − d k)²."""
    tops = jnp.asarray(layout.tops, jnp.float32)[:, None, None]
    d = jnp.max(t, axis=0)[None, None] / tops  # [tops, 1, n]
    k = _nearest_odd(t[None] * inverse(d), layout.k_max)
    ck = curvature[None] * k
    d = jnp.sum(ck * t[None], axis=1) * inverse(jnp.sum(ck * k, axis=1))  # [tops, n]
    rest = t[None] - d[:, None] * k
    loss = jnp.sum(curvature[None] * rest * rest, axis=1)
    return jnp.take_along_axis(d, jnp.argmin(loss, axis=0)[None], axis=0)[0]
