"""4-bit floats, E2M1: a sign and {0, ½, 1, 1½, 2, 3, 4, 6}. The shared part of MXFP4 and NVFP4."""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from jax import Array

from jquant.formats._levels import gain, moments

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest_code(x: Array, scale: Array) -> Array:
    """int32 codes 0 … 15 of x / scale, for scale ≥ 0 [..., 1, n]; never −0, and 0 where the scale is 0.

    x is compared with the scale times the midpoints: exact products for scales of few significant bits.
    """
    size = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.int32)
    for below, above in pairwise(MAGNITUDES):
        code = code + (size > scale * ((below + above) / 2)).astype(jnp.int32)
    code = jnp.where(scale == 0, 0, code)
    return jnp.where((code > 0) & (x < 0), code + 8, code)


def gain_of_scale(size: Array, w: Array, scale: Array) -> Array:
    """What a scale [..., 1, n] saves of Σ w x², with nearest codes; size is |x|."""
    return gain(scale, *moments(size, w, scale, MAGNITUDES))
