"""Factors of one place, channel by channel, for the least of what rounding is estimated to cost there.

    E(s) = Σ_t v_t Δ_t² Σ_j ε_tj² s_j² ω_j  +  Σ_i λ_i δ_i² / 12 · Σ_j m_j / s_j²

    Δ_t = max_j |x_tj / s_j| / 127.5     the step of a token's inputs, and ε its rounding errors in steps;
                                         or one for all tokens, or of a token's range: see `Steps`
    δ_i = max_j |W_ij s_j| / 127         the step of a row, whose rounding errors are taken as uniform
    ω_j = Σ_i λ_i W_ij²,  m_j = Σ_t v_t x_tj²

Errors of different channels are taken as independent, so that nothing is multiplied by W: a step over many
tokens takes milliseconds, and many thousand can be seen. They are needed: the maximum of a token is in one of
its channels, another for each token, and on few tokens its gradient tells little of most channels.

Adam on log s, another batch of tokens and of rows each step. ε is a constant of a step.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jaxtyping import Float

from jquant.smoothquant._smooth import SPAN, Coupling, of_channels, of_inputs

CODES, ROW_CODES = 127.5, 127.0  # what a largest input, and a largest weight, is divided by

# What inputs are counted in: the largest of a token, that of all tokens, or the range of a token.
Steps = Literal["token", "tensor", "range"]


class Descent(NamedTuple):
    steps: int = 100
    rate: float = 0.07
    tokens: int = 512  # of a step
    rows: int = 512


DESCENT = Descent()


class Seen(NamedTuple):
    """What is known of a place: inputs of its consumers, and these, one below the other."""

    x: Float[Array, "n width"]
    tokens: Float[Array, " n"]  # v: what a token's errors count, of sum 1
    weight: Float[Array, "rows width"]
    rows: Float[Array, " rows"]  # λ: what a row's errors count


@partial(jax.jit, static_argnums=(0, 3))
def estimate(
    coupling: Coupling, logs: Float[Array, " channels"], seen: Seen, steps: Steps = "token"
) -> Float[Array, ""]:
    """E of log s."""
    return _estimate(coupling, logs, seen, seen, _column_sums(seen), steps)


@partial(jax.jit, static_argnums=(0, 3, 4))
def descend(
    coupling: Coupling,
    logs: Float[Array, " channels"],
    seen: Seen,
    settings: Descent = DESCENT,
    steps: Steps = "token",
) -> Float[Array, " channels"]:
    """log s of less E, from these. The tokens are in no order."""
    columns = _column_sums(seen)
    known = of_channels(coupling, columns.inputs) > 0
    tokens, rows = (
        _batches(len(a), size) for a, size in ((seen.x, settings.tokens), (seen.weight, settings.rows))
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.rate, settings.steps, alpha=0.02))
    limit = float(np.log(SPAN))

    def step(carry: tuple[Array, optax.OptState], i: Array) -> tuple[tuple[Array, optax.OptState], None]:
        logs, state = carry
        own = Seen(
            *(_batch(a, i, *tokens) for a in (seen.x, seen.tokens)),
            *(_batch(a, i, *rows) for a in (seen.weight, seen.rows)),
        )
        # Adam does not mind how small E is; its logarithm has gradients of a usual size.
        gradient = jax.grad(lambda logs: jnp.log(_estimate(coupling, logs, own, seen, columns, steps)))(logs)
        # A channel without input would go wherever its weights are better off, whatever it gets one day.
        finite = jnp.where(known & jnp.isfinite(gradient), gradient, 0.0)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of counts
            updates, state = optimizer.update(finite, state)
        moved = cast(Array, optax.apply_updates(logs, updates))
        return (jnp.clip(moved, -limit, limit), state), None

    return lax.scan(step, (logs, optimizer.init(logs)), jnp.arange(settings.steps))[0][0]


class _Columns(NamedTuple):
    weights: Array  # ω [width]
    inputs: Array  # m [width]


def _column_sums(seen: Seen) -> _Columns:
    exact = lax.Precision.HIGHEST
    return _Columns(
        jnp.matmul(seen.rows, jnp.square(seen.weight), precision=exact),
        jnp.matmul(seen.tokens, jnp.square(seen.x), precision=exact),
    )


def _estimate(
    coupling: Coupling, logs: Array, own: Seen, whole: Seen, columns: _Columns, steps: Steps
) -> Array:
    """E by some of the tokens and rows."""
    s = jnp.exp(of_inputs(coupling, logs))
    x = own.x / s[None]
    step = _step(x, steps)
    codes = lax.stop_gradient(x / step)
    lost = jnp.sum(jnp.square(jnp.round(codes) - codes) * (columns.weights * s * s)[None], axis=-1)
    inputs = jnp.sum(own.tokens * jnp.broadcast_to(jnp.square(step[:, 0]), lost.shape) * lost)
    row_step = jnp.max(jnp.abs(own.weight) * s[None], axis=-1) / ROW_CODES
    weights = jnp.sum(own.rows * jnp.square(row_step)) / 12 * jnp.sum(columns.inputs / (s * s))
    # What a batch has of all that tokens, and rows, count.
    share, row_share = jnp.sum(own.tokens) / jnp.sum(whole.tokens), jnp.sum(own.rows) / jnp.sum(whole.rows)
    return inputs / share + weights / row_share


def _step(x: Array, steps: Steps) -> Float[Array, "n 1"] | Float[Array, "1 1"]:
    """1 for tokens of zeros."""
    if steps == "range":
        least, most = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
        step = (jnp.maximum(most, 0.0) - jnp.minimum(least, 0.0)) / (2 * CODES)
    else:
        step = jnp.max(jnp.abs(x), axis=None if steps == "tensor" else -1, keepdims=True) / CODES
    return jnp.where(step > 0, step, 1.0)


def _batches(count: int, size: int) -> tuple[int, int]:
    """How many batches of which size: at most this one, none left out by more than a remainder."""
    size = min(size, count)
    return count // size, size


def _batch(a: Array, i: Array, batches: int, size: int) -> Array:
    return lax.dynamic_slice_in_dim(a, i % batches * size, size)
