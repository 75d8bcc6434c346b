"""The output error of a block whose weights and inputs are rounded to 8 bits, with gradients.

Rounding passes gradients on as if it were nothing, but for the scale that its error is counted in: a larger
scale makes a larger error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache, partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jquant.int8.rounding import LARGEST, SPAN, asymmetric_int8, int8, span_of, static_int8
from jquant.models import Block, Parameters, Rounding
from jquant.smoothquant import _smooth as smooth
from jquant.smoothquant._channels import Steps

Logs = dict[str, Array]  # log s by the name of the place


class Data(NamedTuple):
    x: Array  # what goes into the block, [s, t, width]
    y: Array  # what comes out of it in float32
    weight: Array  # 1 for a real token, 0 for padding, [s · t]
    # What an error at the token costs, [s · t], see `token_fisher`. Where that is not known, 1 / |y|²: the
    # norm behind the block divides each token by its size.
    fisher: Array


def _round(x: Array, scale: Array, codes: Array) -> Array:
    """scale · codes for the nearest codes of x. The rounding error, in units of the scale, is a constant."""
    error = lax.stop_gradient(codes.astype(jnp.float32) - x / scale)
    return x + scale * error


def by_token(x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
    """Inputs rounded each token by a scale of its own."""
    codes, scale = int8(lax.stop_gradient(x))
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(absmax > 0, absmax / LARGEST["int8"], scale)
    return _round(x, jnp.broadcast_to(scale, x.shape), codes)


def by_range(x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
    """Inputs rounded each token by the scale of its range, codes having a zero."""
    codes, scale, zero = asymmetric_int8(lax.stop_gradient(x))
    _, span = span_of(x)
    scale = jnp.broadcast_to(jnp.where(span > 0, span / SPAN, scale), x.shape)
    return _round(x, scale, codes.astype(jnp.float32) - zero.astype(jnp.float32))


def by_tensor(x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
    """Inputs rounded by one scale, that of the largest here."""
    absmax = jnp.max(jnp.abs(x))
    scale = jnp.broadcast_to(jnp.where(absmax > 0, absmax / LARGEST["int8"], 1.0), x.shape)
    return _round(x, scale, static_int8(*lax.stop_gradient((x, scale))).codes)


STEPS: Mapping[Rounding, Steps] = {by_token: "token", by_tensor: "tensor", by_range: "range"}


def _rounded_weights(w: Float[Array, "*rows cols"]) -> Float[Array, "*rows cols"]:
    """Without the search for the clip, which finds little in 8 bits."""
    absmax = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    scale = jnp.broadcast_to(jnp.where(absmax > 0, absmax / 127.0, 1.0), w.shape)
    return _round(w, scale, jnp.round(lax.stop_gradient(w / scale)))


def error(
    block: Block,
    quantized: frozenset[str],
    params: Parameters,
    logs: Logs,
    data: Data,
    angles: Array,
    rounding: Rounding = by_token,
    only: Collection[str] | None = None,
) -> Array:
    """The mean KL divergence, in nats, that the block's error is expected to cause: ½ Σ f |ŷ − y|² by the
    number of tokens. only: those of `quantized` that are rounded, all where it is None; compiled once for all
    choices."""
    rounds = {name: jnp.asarray(only is None or name in only) for name in quantized}
    return _error(block, rounding, rounds, params, logs, data, angles)


@partial(jax.jit, static_argnums=(0, 1))
def _error(
    block: Block,
    rounding: Rounding,
    rounds: Mapping[str, Array],
    params: Parameters,
    logs: Logs,
    data: Data,
    angles: Array,
) -> Array:
    """rounds: of each matrix that may be rounded whether it is."""
    made = smooth.smoothed(block, params, jax.tree.map(jnp.exp, logs))
    for name, told in rounds.items():
        weight = made[name]["weight"]
        # What a block tells a rounding of its matrix, expert by expert, is here whether to round.
        made[name] = {
            **made[name],
            "weight": jnp.where(told, _rounded_weights(weight), weight),
            "input_scale": jnp.broadcast_to(told, weight.shape[:-2]),
        }
    rounded = block.clone(rounding=_where_told(rounding), rounded=frozenset(rounds))
    out = cast(Array, rounded.apply({"params": made}, data.x, angles))
    lost = jnp.sum(jnp.square(out - data.y), axis=-1)
    return jnp.sum(lost.reshape(-1) * data.fisher) / (2 * jnp.sum(data.weight))


@cache
def _where_told(rounding: Rounding) -> Rounding:
    return lambda x, told: jnp.where(told, rounding(x), x)
