"""Inputs balanced between groups, for a runtime that rounds many neighbours by the largest's scale.

On a CPU llama.cpp rounds what goes into K-quants, IQ and ternary types to 8 bits, 256 neighbours by one scale
(Q8_K). A norm in front of the matrices can even them out, and the model computes the same:

    y = W x = (W diag(s)) (diag(s)⁻¹ x)

with one s for 32 neighbours, so that a group of weights keeps its form and only its scale changes. The errors
of rounding are independent, so what they make of the outputs of a token x is, up to a constant,

    Σ_block (max_j |x_j / s_j|)² · Σ_j s_j² ‖W_·j‖²

A GPU's rounding, 32 neighbours by a scale, is left as it is.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Float

GROUP, BLOCK = 32, 256
SPAN = 1.5  # no factor is farther from 1: the scales of weights have to hold it
_STEPS, _RATE = 300, 0.05


class Balance(NamedTuple):
    logs: Array  # log s, [groups]
    before: Array  # the error of outputs without it, with it
    after: Array


def group_maxima(x: Float[Array, "tokens width"]) -> Float[Array, "tokens groups"]:
    return jnp.max(jnp.abs(x).reshape(len(x), -1, GROUP), axis=-1)


def group_energies(columns: Float[Array, " width"]) -> Float[Array, " groups"]:
    """Of Σ over rows of W²."""
    return jnp.sum(columns.reshape(-1, GROUP), axis=-1)


def token_weights(sizes: Float[Array, " tokens"], real: Float[Array, " tokens"]) -> Float[Array, " tokens"]:
    """What a token's error counts: about 1 / |x|², for it is the relative error of outputs that matters.

    sizes: |x|²; real: 0 for padding.
    """
    usual = jnp.nanmedian(jnp.where(real > 0, sizes, jnp.nan))
    return jnp.where(real > 0, 1 / (sizes + 0.1 * usual + 1e-30), 0.0)


def noise(
    maxima: Float[Array, "tokens groups"],
    energies: Float[Array, " groups"],
    weights: Float[Array, " tokens"],
    logs: Float[Array, " groups"],
) -> Array:
    """The error of outputs for these factors, up to a constant."""
    s = jnp.exp(logs)
    per_block = BLOCK // GROUP
    largest = jnp.max((maxima / s[None]).reshape(len(maxima), -1, per_block), axis=-1)
    energy = jnp.sum((energies * s * s).reshape(-1, per_block), axis=-1)
    return jnp.sum(weights[:, None] * jnp.square(largest) * energy[None])


@partial(jax.jit, static_argnames="span")
def balance(
    maxima: Float[Array, "tokens groups"],
    energies: Float[Array, " groups"],
    weights: Float[Array, " tokens"],
    span: float = SPAN,
) -> Balance:
    """The factors of least error, by Adam; whole blocks: groups is a multiple of 8.

    Source: ours; the place of the factors is SmoothQuant's (Xiao et al. 2023).
    """
    lost = partial(noise, maxima, energies, weights)
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))
    none = jnp.zeros_like(energies)
    before = lost(none)

    def step(carry: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], None]:
        logs, state = carry
        slope = jax.grad(lambda logs: lost(logs) / jnp.maximum(before, 1e-30))(logs)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of counts
            update, state = optimizer.update(slope, state)
        moved = jnp.asarray(optax.apply_updates(logs, update))
        return (jnp.clip(moved, -jnp.log(span), jnp.log(span)), state), None

    (logs, _), _ = lax.scan(step, (none, optimizer.init(none)), None, length=_STEPS)
    after = lost(logs)
    better = after < before
    return Balance(jnp.where(better, logs, none), before, jnp.minimum(after, before))
