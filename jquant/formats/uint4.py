"""UINT4: each group of 128 weights has a scale and a zero, w ≈ s (q − z) with q and z in [0, 15]. AWQ's.

    weight_packed int32 [rows, cols / 8], the first code in the lowest 4 bits
    weight_scale [rows, cols / 128] | weight_zero_point, whole numbers [rows, cols / 128]

A group whose weights lie to one side of zero loses less than about a zero in the middle. The search clips the
range from the least to the greatest weight, 0 among them, tries the whole zeros next to the best one, refits
the scale for the codes found, Σ w x (q − z) / Σ w (q − z)², and keeps the least error of all.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int8, Int32

from jquant.core import ScaledFormat
from jquant.formats._clip import divided
from jquant.formats.int4 import CODES
from jquant.formats.int4 import pack as pack_signed
from jquant.formats.int4 import unpack as unpack_signed

LARGEST, MIDDLE = 15.0, 8
CLIPS = tuple(np.linspace(0.6, 1.05, 19).tolist())  # of the range
NEIGHBOURS = (-1.0, 0.0, 1.0)


Fitted = tuple[Array, Array]  # scales [n]; zeros [n], whole numbers


def fit(x: Float[Array, "n g"], importance: Float[Array, "n g"] | None) -> Fitted:
    """Scales > 0 of least weighted error; (1, 8) for a group of zeros."""
    w = jnp.ones_like(x) if importance is None else importance
    low = jnp.minimum(jnp.min(x, axis=-1), 0.0)
    span = jnp.maximum(jnp.max(x, axis=-1), 0.0) - low
    safe = jnp.where(span > 0, span, 1.0)

    def keep(best: tuple[Array, Fitted], fitted: Fitted) -> tuple[tuple[Array, Fitted], Array]:
        scale, zero = fitted
        q = _codes(x, fitted) - zero[:, None]
        rest = x - q * scale[:, None]
        error = jnp.sum(w * rest * rest, axis=-1)
        refit = jnp.sum(w * x * q, axis=-1) / jnp.sum(w * q * q, axis=-1)
        better = (error < best[0]) & (scale > 0)  # false for a refit of no weights
        kept = jnp.where(better, scale, best[1][0]), jnp.where(better, zero, best[1][1])
        return (jnp.where(better, error, best[0]), kept), refit

    def step(best: tuple[Array, Fitted], tried: Array) -> tuple[tuple[Array, Fitted], None]:
        clip, neighbour = tried
        scale = span * clip / LARGEST
        # The middle of the range stays where it is while the range is clipped.
        zero = jnp.round(LARGEST / 2 - (low + span / 2) * LARGEST / (safe * clip)) + neighbour
        zero = jnp.clip(zero, 0.0, LARGEST)
        best, refit = keep(best, (scale, zero))
        return keep(best, (refit, zero))[0], None

    tried = jnp.asarray([(clip, zero) for clip in CLIPS for zero in NEIGHBOURS], jnp.float32)
    start = jnp.ones_like(span), jnp.full_like(span, MIDDLE)
    # All weights of a group of zeros are exact at the start already.
    first = jnp.where(span > 0, jnp.inf, 0.0)
    return lax.scan(step, (first, start), tried)[0][1]


def _codes(groups: Float[Array, "n g"], fitted: Fitted) -> Float[Array, "n g"]:
    scale, zero = fitted
    return jnp.clip(jnp.round(divided(groups, scale)) + zero[:, None], 0.0, LARGEST)


def assign(groups: Float[Array, "n g"], fitted: Fitted) -> Int8[Array, "n g"]:
    return _codes(groups, fitted).astype(jnp.int8)


def reconstruct(codes: Int8[Array, "n g"], fitted: Fitted) -> Float[Array, "n g"]:
    scale, zero = fitted
    return (codes.astype(jnp.float32) - zero[:, None]) * scale[:, None]


def pack(codes: Int8[Array, "*rows cols"]) -> Int32[Array, "*rows cols/8"]:
    return pack_signed(codes - MIDDLE)


def unpack(stored: Int32[Array, "*rows words"]) -> Int8[Array, "*rows cols"]:
    return unpack_signed(stored) + MIDDLE


UINT4 = ScaledFormat(
    name="UINT4",
    bits=4,
    group_size=128,
    part="weight_packed",
    type="I32",
    per_code=CODES,
    zeros=True,
    fit=fit,
    assign=assign,
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
)
