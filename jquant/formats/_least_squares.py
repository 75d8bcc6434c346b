"""Scales that minimise the weighted squared error Σ w (x − x̂)² of a block, by search and least squares.

For given codes q the best scale has a closed form; for a given scale the best codes are the nearest. The
search takes the best of a ladder of scales and alternates between the two from there. Its result is
rounded to float16 and compared, as the file will hold it, with the scale of the encoder without importance:
it is never worse.

Terms: x blocks [B, n], w importance [B, n], q codes. Sums run over the B weights of a block and give [n],
accumulated in float32; x and w are first divided by their largest value, so that no sum leaves its range.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jquant.formats._blocks import exact_div, f16_round, inverse

REFITS = 3
_MAX_F16 = 65504.0


def _sums(*terms: Array) -> list[Array]:
    """Sums over the weights of a block, [B, n] → [n], each as a chain that the compiler vectorises."""
    return [reduce(add, list(term)) for term in terms]


def _relative(w: Array) -> Array:
    """w / the block's largest, or ones where no weight of the block matters."""
    largest = jnp.max(w, axis=0)
    return jnp.where((largest > 0)[None], jnp.maximum(w, 0.0) * inverse(largest)[None], 1.0)


def _storable(x: Array) -> Array:
    return f16_round(jnp.clip(x, -_MAX_F16, _MAX_F16))


def search_scale(blocks: Array, importance: Array, low: int, high: int) -> Array:
    """d [n], a float16 value, for x̂ = d q with q in [low, high].

    The codes of a scale give S1 = Σ w x q and S2 = Σ w q²; the error of a scale s with these codes is
    Σ w x² − (2 s S1 − s² S2), least at s = S1 / S2, where the bracket, the gain, is S1² / S2.
    """
    largest = jnp.max(blocks, axis=0)
    smallest = jnp.min(blocks, axis=0)
    peak = jnp.where(largest > -smallest, largest, smallest)
    x = blocks * inverse(peak)[None]  # the weight of largest magnitude is 1
    w = _relative(importance)
    wx = w * x

    def moments(factor: Array) -> tuple[Array, Array]:
        q = jnp.clip(jnp.round(x * factor), low, high)
        s1, s2 = _sums(wx * q, w * q * q)
        return s1, s2

    def better(factor: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        s1, s2 = moments(factor)
        scale = s1 * inverse(s2)
        gain = scale * s1
        return jnp.where(gain > best[0], gain, best[0]), jnp.where(gain > best[0], scale, best[1])

    # The weight of largest magnitude becomes code `low` or `high`, less, or a little more and is clipped.
    ladder = [low * f for f in np.linspace(0.87, 1.11, 13)]
    if -low != high:
        ladder += [high * f for f in np.linspace(0.90, 1.10, 11)]
    ladder = jnp.asarray(ladder, jnp.float32)
    best = (jnp.full(peak.shape, -1.0), jnp.zeros(peak.shape))
    best = lax.fori_loop(0, len(ladder), lambda k, best: better(ladder[k], best), best)
    best = lax.fori_loop(0, REFITS, lambda _, best: better(inverse(best[1])[None], best), best)

    def stored_gain(d: Array) -> Array:
        scale = d * inverse(peak)
        s1, s2 = moments(inverse(scale)[None])
        return scale * (2 * s1 - scale * s2)

    d, plain = _storable(best[1] * peak), _storable(exact_div(peak, float(low)))
    return jnp.where(stored_gain(plain) > stored_gain(d), plain, d)


def search_affine(blocks: Array, importance: Array, levels: int) -> tuple[Array, Array]:
    """(d, m) [n], float16 values, for x̂ = d q + m with q in [0, levels].

    With S = Σ w, Sx = Σ w x, Sq = Σ w q, Sqq = Σ w q², Sxq = Σ w x q, the least-squares line through
    (q, x) has slope d = (S Sxq − Sx Sq) / (S Sqq − Sq²) and m = (Sx − d Sq) / S. Against the best
    constant it lowers the error by d (S Sxq − Sx Sq) / S: the gain, up to the constant factor 1 / S.
    """
    smallest = jnp.min(blocks, axis=0)
    spread = jnp.max(blocks, axis=0) - smallest
    x = (blocks - smallest[None]) * inverse(spread)[None]  # in [0, 1]
    w = _relative(importance)
    wx = w * x
    s, sx = _sums(w, wx)

    def better(factor: Array, shift: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
        q = jnp.clip(jnp.round((x - shift) * factor), 0, levels)
        wq = w * q
        sq, sqq, sxq = _sums(wq, wq * q, wx * q)
        covariance = s * sxq - sx * sq
        scale = covariance * inverse(s * sqq - sq * sq)
        gain = scale * covariance
        found = (gain, scale, (sx - scale * sq) * inverse(s))
        return tuple(jnp.where(gain > best[0], new, old) for new, old in zip(found, best, strict=True))

    ladder = jnp.asarray(np.linspace(levels - 1, levels + 1, 17), jnp.float32)
    zero = jnp.zeros(spread.shape)
    best = (zero - 1, zero, zero)
    best = lax.fori_loop(0, len(ladder), lambda k, best: better(ladder[k], jnp.float32(0), best), best)
    best = lax.fori_loop(0, REFITS, lambda _, best: better(inverse(best[1])[None], best[2][None], best), best)

    def refit_after_rounding(scale: Array, shift: Array) -> tuple[Array, Array]:
        """m rounded to float16 first, then d for that m."""
        m = _storable(smallest + shift * spread)
        shift = (m - smallest) * inverse(spread)
        q = jnp.clip(jnp.round((x - shift[None]) * inverse(scale)[None]), 0, levels)
        wq = w * q
        sq, sqq, sxq = _sums(wq, wq * q, wx * q)
        return _storable((sxq - shift * sq) * inverse(sqq) * spread), m

    def error(d: Array, m: Array) -> Array:
        scale, shift = d * inverse(spread), (m - smallest) * inverse(spread)
        rest = x - shift[None]
        q = jnp.clip(jnp.round(rest * inverse(scale)[None]), 0, levels)
        rest = rest - q * scale[None]
        return _sums(w * rest * rest)[0]

    d, m = refit_after_rounding(best[1], best[2])
    plain_d, plain_m = _storable(exact_div(spread, float(levels))), _storable(smallest)
    worse = error(plain_d, plain_m) < error(d, m)
    return jnp.where(worse, plain_d, d), jnp.where(worse, plain_m, m)
