"""Weights near the end of float32's range, which XLA's CPU backend flushes to zero and C does not.

Blocks of such weights are rare and decode to zeros either way, but their bytes shall equal ggml's. Their
weights are multiplied by MAGNIFIER, read from the bits, so that every step works on normal numbers.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jquant.formats._blocks import rounded

MAGNIFIER = 2.0**60
LEAST = 2.0**-80  # of larger blocks, the scale, its inverse and all products are normal numbers


def magnify(x: Array, tiny: Array) -> tuple[Array, Array]:
    """(x · unit, unit) for x [n] or [weights, n]: unit is MAGNIFIER where `tiny` [n] and 1 elsewhere."""
    unit = jnp.where(tiny, MAGNIFIER, 1.0).astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    size = bits & 0x7FFFFFFF
    subnormal = size.astype(jnp.float32) * 2.0**-89  # the mantissa's unit, 2⁻¹⁴⁹, times MAGNIFIER
    subnormal = jnp.where(bits < 0, -subnormal, subnormal)
    magnified = jnp.where(size < 0x00800000, subnormal, x * MAGNIFIER)
    return jnp.where(jnp.broadcast_to(tiny, x.shape), magnified, x), unit


def on_subnormal_grid(d: Array, unit: Array) -> Array:
    """Round a magnified d as float32 rounds the subnormal d / unit: to a multiple of 2⁻¹⁴⁹."""
    shift = 1.5 * 2.0**-66  # its last bit is 2⁻¹⁴⁹ · MAGNIFIER
    coarse = jnp.copysign(rounded(d + shift) - shift, d)
    return jnp.where((unit > 1) & (jnp.abs(d) < 2.0**-66), coarse, d)
