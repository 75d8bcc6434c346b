"""Groups with one scale, w ≈ s q, and its search where codes lie about zero: clip, round, refit, compare.

With a scale s and codes q the error is Σ w (x − s q)². For given codes the best scale is Σ w x q / Σ w q²,
and for a given scale the best codes are the nearest; the search tries a row of scales max|x| · c / Q, where Q
is the largest code, refits each once, and keeps the least error of all. c = 1 without a refit, which clips
nothing, is among them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Shaped

Assign = Callable[[Array, Array], Array]


def fit_scale(
    x: Float[Array, "n g"],
    importance: Float[Array, "n g"] | None,
    *,
    clips: tuple[float, ...],
    largest: float,
    assign: Assign,
) -> Float[Array, " n"]:
    """Scales > 0 of least weighted error; 1 for a group of zeros. largest: the largest code's magnitude."""
    w = jnp.ones_like(x) if importance is None else importance
    absmax = jnp.max(jnp.abs(x), axis=-1)

    def error(scale: Array) -> tuple[Array, Array]:
        q = assign(x, scale).astype(jnp.float32)
        rest = x - q * scale[:, None]
        refit = jnp.sum(w * x * q, axis=-1) / jnp.sum(w * q * q, axis=-1)
        return jnp.sum(w * rest * rest, axis=-1), refit

    def keep(best: tuple[Array, Array], scale: Array) -> tuple[Array, Array]:
        found, _ = error(scale)
        better = (found < best[0]) & (scale > 0)  # false for a refit of no weights
        return jnp.where(better, found, best[0]), jnp.where(better, scale, best[1])

    def step(best: tuple[Array, Array], clip: Array) -> tuple[tuple[Array, Array], None]:
        scale = absmax * clip / largest
        _, refit = error(scale)
        return keep(keep(best, scale), refit), None

    plain = jnp.where(absmax > 0, absmax / largest, 1.0)
    found, _ = error(plain)
    return lax.scan(step, (found, plain), jnp.asarray(np.array(clips, np.float32)))[0][1]


def divided(x: Float[Array, "n g"], scale: Float[Array, " n"]) -> Float[Array, "n g"]:
    """x / scale, as runtimes divide; 0 where the scale is 0."""
    return jnp.where(scale[:, None] > 0, x / jnp.where(scale > 0, scale, 1.0)[:, None], 0.0)


def reconstruct(codes: Shaped[Array, "n g"], scales: Float[Array, " n"]) -> Float[Array, "n g"]:
    return codes.astype(jnp.float32) * scales[:, None]


def as_it_is(codes: Array) -> Array:
    """How codes are packed that have a type of their own, and unpacked."""
    return codes
