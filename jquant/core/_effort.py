"""How long an encoder searches."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PyTree

from jquant.core._format import Format

# How long to search: "fast" is each format's own search, "best" the best of several that start differently.
Effort = Literal["fast", "best"]


@cache
def at_effort(format: Format, effort: Effort) -> Format:
    """The format with the search of this effort, for `encode_chunk`.

    "best" takes some five times as long and keeps, block by block, what has the least error.
    """
    if effort == "fast" or format.fit is None or format.block_size == 1:
        return format
    return replace(format, fit=partial(_best_of_starts, format))


def _best_of_starts(
    format: Format, blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None
) -> PyTree:
    """Scales of least weighted error, of the searches for four importances.

    The importance given is one. In the others large weights count more, or less, or all weights are more
    alike: each leads the search to other scales, and what it finds is judged by the importance given.
    """
    fit, assign = format.fit, format.assign
    assert fit is not None
    assert assign is not None
    w = jnp.ones_like(blocks) if importance is None else importance
    heaviest = jnp.max(w, axis=0)
    w = w / jnp.where(heaviest > 0, heaviest, 1)[None]  # so that no sum leaves float32's range
    largest = jnp.max(jnp.abs(blocks), axis=0)
    x = blocks / jnp.where(largest > 0, largest, 1)[None]
    steep = jnp.sqrt(jnp.mean(x * x, axis=0)[None] + x * x) + 1e-6
    starts = jnp.stack([w, w * steep, w / steep, jnp.sqrt(w * jnp.mean(w, axis=0)[None])])

    def error(scales: PyTree) -> Array:
        decoded = format.reconstruct(assign(blocks, importance, scales), scales)
        rest = (blocks - decoded) / jnp.where(largest > 0, largest, 1)[None]
        found = jnp.sum(w * rest * rest, axis=0)
        return jnp.where(jnp.isnan(found), jnp.inf, found)

    def step(best: tuple[Array, PyTree], start: Array) -> tuple[tuple[Array, PyTree], None]:
        scales = lax.optimization_barrier(fit(blocks, start))
        found = error(scales)
        better = found < best[0]
        kept = jax.tree.map(lambda a, b: jnp.where(jnp.broadcast_to(better, a.shape), a, b), scales, best[1])
        return (jnp.minimum(found, best[0]), kept), None

    if importance is None:  # the search without importance is one of its own
        scales = fit(blocks, None)
        best = error(scales), scales
    else:
        zero = jnp.where(largest == largest, 0.0, 0.0)  # varies over devices as the blocks do
        shapes = jax.eval_shape(fit, blocks, importance)
        best = zero + jnp.inf, jax.tree.map(lambda a: jnp.broadcast_to(zero.astype(a.dtype), a.shape), shapes)
    return lax.scan(step, best, starts)[0][1]
