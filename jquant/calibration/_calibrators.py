"""Calibrators: pure functions that turn the inputs of a matrix into statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

Stats = dict[str, Array]


class Calibrator(NamedTuple):
    """init(width) → statistics of no tokens. update(statistics, x [n, width], weight [n]) adds n tokens, but
    those of weight 0. merge(a, b) → statistics of the tokens of both. squares: those that are [width, width],
    whose rows several devices may share."""

    init: Callable[[int], Stats]
    update: Callable[[Stats, Array, Array], Stats]
    merge: Callable[[Stats, Stats], Stats]
    squares: frozenset[str] = frozenset()


def add(a: Stats, b: Stats) -> Stats:
    """The merge of statistics that are all sums."""
    return {name: a[name] + b[name] for name in a}


def add_or_raise(a: Stats, b: Stats) -> Stats:
    """The merge of statistics that are sums, but "absmax" a maximum."""
    return {name: jnp.maximum(a[name], b[name]) if name == "absmax" else a[name] + b[name] for name in a}


def count_of(weight: Float[Array, " n"]) -> Int[Array, ""]:
    return jnp.sum(weight > 0, dtype=jnp.int32)


def _init_vector(name: str) -> Callable[[int], Stats]:
    return lambda width: {name: jnp.zeros(width, jnp.float32), "count": jnp.zeros((), jnp.int32)}


def _add_squares(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    x = x.astype(jnp.float32)
    return add(stats, {"sum2": jnp.einsum("ni,ni,n->i", x, x, weight), "count": count_of(weight)})


def _add(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    x = x.astype(jnp.float32)
    return add(stats, {"sum": jnp.einsum("ni,n->i", x, weight), "count": count_of(weight)})


def _raise(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    absmax = jnp.max(jnp.abs(x.astype(jnp.float32)) * weight[:, None], axis=0)
    return add_or_raise(stats, {"absmax": absmax, "count": count_of(weight)})


def _add_products(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    xtx = jnp.einsum(
        "ni,nj->ij",
        x * weight.astype(x.dtype)[:, None],
        x,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return add(stats, {"xtx": xtx, "count": count_of(weight)})


# Σ x²: the imatrix. Σ x. max |x|. All float32 [width], beside "count", the number of tokens.
SECOND_MOMENTS = Calibrator(_init_vector("sum2"), _add_squares, add)
MEANS = Calibrator(_init_vector("sum"), _add, add)
ABSOLUTE_MAXIMA = Calibrator(_init_vector("absmax"), _raise, add_or_raise)
# Σ xᵀx, float32 [width, width], symmetric: the Hessian of the layer's squared error. Costs width/out of the
# layer itself: 2 · tokens · width² operations.
HESSIAN = Calibrator(
    lambda width: {"xtx": jnp.zeros((width, width), jnp.float32), "count": jnp.zeros((), jnp.int32)},
    _add_products,
    add,
    squares=frozenset({"xtx"}),
)


@runtime_checkable
class Merges(Protocol):
    """A calibrator of inputs or of gradients."""

    @property
    def merge(self) -> Callable[[Stats, Stats], Stats]: ...


def merge(calibrator: Merges, a: Mapping[str, Stats], b: Mapping[str, Stats]) -> dict[str, Stats]:
    """The statistics of two runs of one model as if they had been one run.

    Raises ValueError where the runs are of different models.
    """
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"statistics of different models: {odd[0]} and {len(odd) - 1} more are in one only.")
    return {name: calibrator.merge(a[name], b[name]) for name in a}
