"""Arithmetic that all formats share. Arrays are [weights, …, blocks]: the block index is the last axis."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

F16_MAX = 65504.0  # the largest finite float16


def rounded(x: Array) -> Array:
    """x, rounded to its type before anything else is done with it.

    Within one fused loop the compiler may contract a·b + c into a single rounded operation; ggml rounds
    twice. Exact products (few significant bits) need no such care.
    """
    # A maximum that changes no finite value stands between product and sum. An optimization barrier does
    # not: XLA's CPU backend removes it before it forms multiply-adds.
    return jnp.maximum(x, float(jnp.finfo(x.dtype).min))


def zeros_along(x: Array) -> Array:
    """Zeros of x's shape, as a loop starts from. Inside `shard_map` they vary over devices as x does, which
    `zeros_like` does not tell JAX before 0.7."""
    return jnp.where(x == x, 0.0, 0.0).astype(x.dtype)


def exact_div(x: Array, y: Array | float) -> Array:
    """x / y as IEEE divides. The compiler turns division by a constant into a product with 1/y."""
    y = lax.optimization_barrier(jnp.where(x == x, y, x))  # a full divisor that cannot be folded
    return lax.optimization_barrier(x / y)


def inverse(d: Array) -> Array:
    """1/d, and 0 where d is 0, so that an all-zero block gets zero codes."""
    return jnp.where(d == 0, 0.0, exact_div(jnp.ones_like(d), jnp.where(d == 0, 1.0, d)))


def f16_round(x: Array) -> Array:
    """float32 → the nearest float16, as float32: the scale that the file can hold."""
    return x.astype(jnp.float16).astype(jnp.float32)


def storable(d: Array) -> Array:
    """The nearest finite float16, as float32."""
    return f16_round(jnp.clip(d, -F16_MAX, F16_MAX))


def unit_of(blocks: Array) -> Array:
    """The power of two at or below the largest weight of each block [B, n]: [n]. It scales without rounding.

    Weights below 2⁻³⁰ do not survive a float16 scale, those above 2¹⁰⁰ saturate, so the unit stays between,
    where its inverse and its products are normal numbers.
    """
    largest = jnp.clip(jnp.max(jnp.abs(blocks), axis=0), 2.0**-30, 2.0**100)
    exponent = lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
    return lax.bitcast_convert_type(exponent, jnp.float32)


def f16_bytes(x: Array) -> Array:
    """[…, n] float32 → uint8 [2, …, n], little endian."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16)
    return jnp.stack([bits & 0xFF, bits >> 8]).astype(jnp.uint8)


def f16_from_bytes(data: Array) -> Array:
    """uint8 [2, …, n], little endian → float32 […, n]."""
    low, high = data.astype(jnp.uint16)
    return lax.bitcast_convert_type(low | high << 8, jnp.float16).astype(jnp.float32)


def joined_bits(fields: Array, bits: int, axis: int) -> Array:
    """Fields of `bits` bits along an axis, uint8, side by side in one byte; the first is lowest.

    A reduction, since that is a loop of its own: written as shifted slices, it is not vectorised.
    """
    shift = bits * jnp.arange(fields.shape[axis], dtype=jnp.uint8)
    shift = shift.reshape([-1 if a == axis else 1 for a in range(fields.ndim)])
    shifted = fields << jnp.broadcast_to(shift, fields.shape)
    return lax.reduce(shifted, np.uint8(0), lax.bitwise_or, (axis,))


def stacked_bytes(*parts: Array) -> Array:
    """[k, n] each → [Σ k, n]. Writing parts in place vectorises; a fused concatenation asks at each byte."""
    out = jnp.zeros((sum(map(len, parts)), parts[0].shape[-1]), jnp.uint8)
    start = 0
    for part in parts:
        out = lax.dynamic_update_slice(out, part, (start, 0))
        start += len(part)
    return out
