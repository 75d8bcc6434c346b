"""How large the inputs of matrices are, channel by channel: extremes, moments and quantiles.

Magnitudes are counted in bins of a quarter of an octave from 2⁻²⁰ to 2¹²; the first and the last bin take
what lies outside too. Counts add up, so quantiles of merged runs are those of one run.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jquant.calibration._calibrators import Calibrator, Stats, add_or_raise, count_of

BINS_PER_OCTAVE, LOWEST_OCTAVE, BINS = 4, -20, 128


def _init(width: int) -> Stats:
    vectors = {name: jnp.zeros(width, jnp.float32) for name in ("absmax", "sum", "sum2")}
    return {**vectors, "histogram": jnp.zeros((width, BINS), jnp.int32), "count": jnp.zeros((), jnp.int32)}


def _update(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    x = x.astype(jnp.float32)
    size = jnp.abs(x)
    octaves = jnp.log2(jnp.maximum(size, jnp.finfo(jnp.float32).tiny)) - LOWEST_OCTAVE
    at = jnp.clip(jnp.floor(octaves * BINS_PER_OCTAVE), 0, BINS - 1).astype(jnp.int32)
    channel = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape)
    seen = jnp.broadcast_to((weight > 0).astype(jnp.int32)[:, None], x.shape)
    new = {
        "absmax": jnp.max(size * weight[:, None], axis=0),
        "sum": jnp.einsum("ni,n->i", x, weight),
        "sum2": jnp.einsum("ni,ni,n->i", x, x, weight),
        "histogram": jnp.zeros((x.shape[1], BINS), jnp.int32).at[channel, at].add(seen),
        "count": count_of(weight),
    }
    return add_or_raise(stats, new)


# max |x|, Σ x, Σ x², all float32 [width]; a histogram of |x|, int32 [width, BINS]; the number of tokens.
RANGES = Calibrator(_init, _update, add_or_raise)


def _init_extremes(width: int) -> Stats:
    vectors = {name: jnp.zeros(width, jnp.float32) for name in ("absmax", "sum2")}
    return {**vectors, "count": jnp.zeros((), jnp.int32)}


def _update_extremes(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    x = x.astype(jnp.float32)
    new = {
        "absmax": jnp.max(jnp.abs(x) * weight[:, None], axis=0),
        "sum2": jnp.einsum("ni,ni,n->i", x, x, weight),
        "count": count_of(weight),
    }
    return add_or_raise(stats, new)


# max |x| and Σ x², float32 [width]; the number of tokens.
EXTREMES = Calibrator(_init_extremes, _update_extremes, add_or_raise)


def quantile(stats: Mapping[str, Array | np.ndarray], q: float) -> Float[np.ndarray, "*stack width"]:
    """A bound b of the share q of each channel's magnitudes, from the statistics of RANGES.

    The q-quantile of |x| lies in (b / 2^¼, b] where it is within the bins. 0 where no token was seen.
    """
    counts = np.cumsum(np.asarray(stats["histogram"], np.int64), axis=-1)
    rank = np.maximum(np.ceil(q * counts[..., -1:]), 1)
    at = (counts >= rank).argmax(axis=-1)
    edge = np.exp2((at + 1) / BINS_PER_OCTAVE + LOWEST_OCTAVE)
    absmax = np.asarray(stats["absmax"], np.float64)
    # The last bin has no upper edge but the largest magnitude.
    return np.where(at == BINS - 1, absmax, np.minimum(edge, absmax)).astype(np.float32)
