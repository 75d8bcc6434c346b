"""Scales that minimise the weighted squared error Σ w (x − x̂)² of a block, by search and least squares.

For given codes q the best scale has a closed form; for a given scale the best codes are the nearest. The
search takes the best of a ladder of scales and alternates between the two from there. Its result is
rounded to float16 and compared, as the file will hold it, with the scale of the encoder without importance:
it is never worse.

Terms: x blocks [B, n], w importance [B, n], q codes. Sums run over the B weights of a block and give [n],
accumulated in float32; x and w are first divided by their largest value, so that no sum leaves its range.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jquant.formats._blocks import exact_div, inverse, storable, zeros_along

REFITS = 3
_REACH = 1e7  # beyond the largest weight that any of these types can hold; larger ones are clipped to it


def _sum(terms: Array) -> Array:
    return jnp.sum(terms, axis=0)


def _ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0; the last bit does not matter here."""
    return jnp.where(y == 0, 0.0, x / jnp.where(y == 0, 1.0, y))


def _relative(w: Array) -> Array:
    """w / the block's largest, or ones where no weight of the block matters."""
    largest = jnp.max(w, axis=0)
    return jnp.where((largest > 0)[None], jnp.maximum(w, 0.0) * inverse(largest)[None], 1.0)


def search_scale(blocks: Array, importance: Array, low: int, high: int, ladder: np.ndarray) -> Array:
    """d [n], a float16 value, for x̂ = d q with q in [low, high].

    The codes of a scale give S1 = Σ w x q and S2 = Σ w q². The error of a scale s with these codes is
    Σ w x² − s (2 S1 − s S2): least at s = S1 / S2, where what it saves, the gain, is S1² / S2.

    ladder: what code the weight of largest magnitude is tried as; beyond low and high it is clipped.
    """
    blocks = jnp.clip(blocks, -_REACH, _REACH)
    largest, smallest = jnp.max(blocks, axis=0), jnp.min(blocks, axis=0)
    peak = jnp.where(largest > -smallest, largest, smallest)
    x = blocks * inverse(peak)[None]  # the weight of largest magnitude is 1
    w = _relative(importance)

    def codes(factor: Array) -> Array:
        return jnp.clip(jnp.round(x * factor[None]), low, high)

    factors = jnp.asarray(ladder, jnp.float32)

    def climb(k: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        """best: the largest gain so far, and the inverse of the least-squares scale that has it."""
        gain, factor = best
        q = codes(jnp.where(k < len(ladder), factors[jnp.minimum(k, len(ladder) - 1)], factor))
        s1, s2 = _sum(w * q * x), _sum(w * q * q)
        found = s1 * _ratio(s1, s2)
        return jnp.maximum(found, gain), jnp.where(found > gain, _ratio(s2, s1), factor)

    start = (zeros_along(peak), zeros_along(peak) + low)
    _, factor = lax.fori_loop(0, len(ladder) + REFITS, climb, start)

    def error(d: Array) -> Array:
        scale = d * inverse(peak)
        return _sum(w * (x - scale[None] * codes(inverse(scale))) ** 2)

    d, plain = storable(_ratio(peak, factor)), storable(exact_div(peak, float(low)))
    return jnp.where(error(plain) < error(d), plain, d)


def search_affine(blocks: Array, importance: Array, levels: int) -> tuple[Array, Array]:
    """(d, m) [n], float16 values, for x̂ = d q + m with q in [0, levels].

    With S = Σ w, Sx = Σ w x, Sq = Σ w q, Sqq = Σ w q², Sxq = Σ w x q, the least-squares line through
    (q, x) has slope d = C / V and m = (Sx − d Sq) / S, where C = S Sxq − Sx Sq and V = S Sqq − Sq².
    Compared with the best constant it lowers the error by C² / V / S: the gain, up to 1 / S.
    """
    blocks = jnp.clip(blocks, -_REACH, _REACH)
    smallest = jnp.min(blocks, axis=0)
    spread = jnp.max(blocks, axis=0) - smallest
    x = (blocks - smallest[None]) * inverse(spread)[None]  # in [0, 1]
    w = _relative(importance)
    s, sx = _sum(w), _sum(w * x)

    def codes(factor: Array, shift: Array) -> Array:
        return jnp.clip(jnp.round((x - shift[None]) * factor[None]), 0, levels)

    # Tried first: lines that clip part of the range, or leave a level unused, at one end or both.
    stretch = np.tile(np.linspace(0.9, 1.3, 8), 3)
    below = np.repeat([0.0, 0.5, 1.0], 8)
    ladder = levels * stretch
    factors = jnp.asarray(ladder, jnp.float32)
    shifts = jnp.asarray(below * (1 - 1 / stretch), jnp.float32)

    def climb(k: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """best: the gain of the best codes so far, and 1/d and m of their least-squares line."""
        gain, factor, shift = best
        first, i = k < len(ladder), jnp.minimum(k, len(ladder) - 1)
        q = codes(jnp.where(first, factors[i], factor), jnp.where(first, shifts[i], shift))
        sq, sqq, sxq = _sum(w * q), _sum(w * q * q), _sum(w * q * x)
        c, v = s * sxq - sx * sq, s * sqq - sq * sq
        slope = _ratio(c, v)
        better = slope * c > gain
        return (
            jnp.where(better, slope * c, gain),
            jnp.where(better, _ratio(v, c), factor),
            jnp.where(better, (sx - slope * sq) / s, shift),
        )

    zero = zeros_along(spread)
    _, factor, shift = lax.fori_loop(0, len(ladder) + REFITS, climb, (zero, zero, zero))

    def held(m: Array) -> tuple[Array, Array]:
        """As the file will hold it: m rounded to float16 first, then the best d for that m and its codes."""
        m = storable(m)
        shift = (m - smallest) * inverse(spread)
        q = codes(factor, shift)
        return storable(_ratio(_sum(w * q * (x - shift[None])), _sum(w * q * q)) * spread), m

    def error(d: Array, m: Array) -> Array:
        scale, shift = d * inverse(spread), (m - smallest) * inverse(spread)
        q = codes(_ratio(jnp.ones_like(scale), scale), shift)
        return _sum(w * (x - shift[None] - q * scale[None]) ** 2)

    # The smallest weight itself too: where weights lie on a grid, it may be the one float16 that fits.
    plain = storable(exact_div(spread, float(levels))), storable(smallest)
    best = held(smallest + shift * spread)
    for other in (held(smallest), plain):
        is_better = error(*other) < error(*best)
        best = jax.tree.map(lambda a, b, better=is_better: jnp.where(better, a, b), other, best)
    return best
