"""Inputs of matrices as 8-bit numbers, each token (row) with a scale of its own, or all with a given one.

    int8  s = max|x| / 127.5, q = round(x / s) in [−128, 127]
    fp8   s = max|x| / 448,   q = x / s as e4m3

    int8-asymmetric  s = (max(x, 0) − min(x, 0)) / 255, z = round(−128 − min(x, 0) / s),
                     q = round(x / s + z) in [−128, 127],  x ≈ s (q − z)

What a given scale makes too large is clipped.

Source: compressed-tensors, compute_dynamic_scales_and_zp; vLLM divides by 127 instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

# max|x| / s: what the largest magnitude is divided by.
LARGEST: Mapping[str, float] = {"int8": 127.5, "fp8": 448.0}
SPAN = 255.0  # what a token's range is divided by where codes have a zero


class Quantized(NamedTuple):
    codes: Array  # [*n, width]
    scale: Array  # float32 [*n, 1], or the one given


def int8(x: Float[Array, "*n width"]) -> Quantized:
    """Bit for bit what Torch computes: −max|x| comes to −127.5, and the last bit decides on −127 or −128."""
    return static_int8(x, _scale(x, LARGEST["int8"]))


def fp8(x: Float[Array, "*n width"]) -> Quantized:
    return static_fp8(x, _scale(x, LARGEST["fp8"]))


def static_int8(x: Float[Array, "*n width"], scale: Float[Array, "..."]) -> Quantized:
    """scale > 0: broadcast to x."""
    codes = jnp.clip(jnp.round(divided_once(x.astype(jnp.float32), scale)), -128, 127)
    return Quantized(codes.astype(jnp.int8), scale)


def static_fp8(x: Float[Array, "*n width"], scale: Float[Array, "..."]) -> Quantized:
    largest = LARGEST["fp8"]  # beyond it e4m3 knows only NaN
    codes = jnp.clip(divided_once(x.astype(jnp.float32), scale), -largest, largest)
    return Quantized(codes.astype(jnp.float8_e4m3fn), scale)


def span_of(x: Float[Array, "*n width"]) -> tuple[Float[Array, "*n 1"], Float[Array, "*n 1"]]:
    """Where a token's range begins, 0 at most, and how far it goes, to 0 at least."""
    least = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0.0)
    return least, jnp.maximum(jnp.max(x, axis=-1, keepdims=True), 0.0) - least


class Shifted(NamedTuple):
    codes: Array  # int8 [*n, width]
    scale: Array  # float32 [*n, 1]
    zero: Array  # int8 [*n, 1]: the code of 0


def asymmetric_int8(x: Float[Array, "*n width"]) -> Shifted:
    """Bit for bit what compressed-tensors computes in Torch. Each token's range is used whole."""
    x = x.astype(jnp.float32)
    least, span = span_of(x)
    scale = jnp.where(span > 0, divided_once(span, jnp.full_like(span, SPAN)), 1.0)
    zero = jnp.clip(jnp.round(-128.0 - divided_once(least, scale)), -128, 127)
    codes = jnp.clip(jnp.round(divided_once(x, scale) + zero), -128, 127)
    return Shifted(codes.astype(jnp.int8), scale, zero.astype(jnp.int8))


def _scale(x: Array, largest: float) -> Float[Array, "*n 1"]:
    """1 for a row of zeros."""
    absmax = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return jnp.where(absmax > 0, divided_once(absmax, jnp.full_like(absmax, largest)), 1.0)


def divided_once(x: Array, y: Float[Array, "..."]) -> Array:
    """x / y, rounded once. XLA is apt to multiply by 1 / y, which rounds twice, where one y is for many x.

    So it is shown one that depends on x: a NaN divided by itself is what it would be divided by y. A barrier
    would do too, but all of y and x / y would then lie in memory.
    """
    return x / jnp.where(jnp.isnan(x), x, y)


# By name: of x with scales of its own, and of x and a scale.
QUANTIZERS: Mapping[str, Callable[[Array], Quantized]] = {"int8": int8, "fp8": fp8}
STATIC_QUANTIZERS: Mapping[str, Callable[[Array, Array], Quantized]] = {
    "int8": static_int8,
    "fp8": static_fp8,
}


def _rounding(quantize: Callable[..., Quantized]) -> Callable[..., Array]:
    def rounded(x: Float[Array, "*n width"], *scale: Float[Array, "..."]) -> Float[Array, "*n width"]:
        """x as these numbers have it. Its gradient is that of x itself (straight-through)."""
        codes, used = quantize(lax.stop_gradient(x), *scale)
        decoded = codes.astype(jnp.float32) * jnp.broadcast_to(used, x.shape)
        return x + lax.stop_gradient(decoded - x)

    return rounded


def _asymmetric(x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
    """x as these numbers have it, likewise."""
    codes, scale, zero = asymmetric_int8(lax.stop_gradient(x))
    decoded = (codes.astype(jnp.float32) - zero.astype(jnp.float32)) * jnp.broadcast_to(scale, x.shape)
    return x + lax.stop_gradient(decoded - x)


ROUNDINGS: Mapping[str, Callable[[Array], Array]] = {
    **{name: _rounding(quantize) for name, quantize in QUANTIZERS.items()},
    "int8-asymmetric": _asymmetric,
}
STATIC_ROUNDINGS: Mapping[str, Callable[[Array, Array], Array]] = {
    name: _rounding(quantize) for name, quantize in STATIC_QUANTIZERS.items()
}
