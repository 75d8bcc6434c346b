"""What a layer is fitted to, where what reaches it is no longer what reached it in the original.

With x₀ a layer's inputs in the original model, x those in the quantized one, H = E[x xᵀ] and C = E[x₀ xᵀ],

    W' = W + α W (C − H)(H + λ I)⁻¹

is for α = 1, λ = 0 the least squares fit of W x₀ by W' x: so a layer also mends what the layers before it
have lost. It is a regression with as many unknowns a row as there are columns, and learns the sampling error
of C and H too: of a wide layer and a few thousand tokens, more of it than of what was lost. So α and λ are
found by cross-validation: what the change learned from one half of the tokens takes from |W x₀ − W' x|² on
the other. `sequential` takes less than that α, for a whole model and for text unlike the samples.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jquant.ldlq._cholesky import solve

RIDGES = (0.05, 0.2, 0.8)  # λ tried, relative to the mean diagonal of H
JUDGED = 512  # rows of a matrix by which α and λ are chosen

PRECISION = lax.Precision.HIGHEST


class Moments(NamedTuple):
    """Of tokens, each with some weight."""

    H: Float[Array, "cols cols"]  # Σ x xᵀ
    C: Float[Array, "cols cols"]  # Σ x₀ xᵀ


class Strength(NamedTuple):
    alpha: float
    ridge: float  # λ, relative to the mean diagonal of H


# Where nothing can be held out.
CAUTIOUS = Strength(0.5, 0.2)


@jax.jit
def corrected(
    W: Float[Array, "rows cols"], moments: Moments, alpha: float | Array, ridge: float | Array
) -> Float[Array, "rows cols"]:
    """W'."""
    return W + alpha * _change(W, moments, ridge)


def _change(W: Array, moments: Moments, ridge: float | Array) -> Float[Array, "rows cols"]:
    """W' − W at α = 1."""
    H, C = moments
    scale = jnp.trace(H) / len(H)
    damped = H + (ridge * scale + jnp.where(scale > 0, 0.0, 1.0)) * jnp.eye(len(H))
    if len(W) < len(H):  # fewer to solve for
        return solve(damped, jnp.matmul(W, C - H, precision=PRECISION).T).T
    return jnp.matmul(W, solve(damped, (C - H).T).T, precision=PRECISION)


@jax.jit
def _judged(
    W: Float[Array, "rows cols"], learned: Moments, judge: Moments, ridges: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """(a, b) for each ridge: α times what was learned takes 2 α a − α² b from the judge's |W x₀ − W' x|²."""
    lost = jnp.matmul(W, judge.C - judge.H, precision=PRECISION)

    def of(ridge: Array) -> tuple[Array, Array]:
        D = _change(W, learned, ridge)
        return jnp.sum(lost * D), jnp.sum(jnp.matmul(D, judge.H, precision=PRECISION) * D)

    return lax.map(of, ridges)


def cross_validated(W: Float[Array, "rows cols"], halves: tuple[Moments, Moments]) -> Strength:
    """The α in [0, 1] and λ that mend most, each half of the tokens judging what the other half taught."""
    ridges = jnp.asarray(RIDGES, jnp.float32)
    one, other = halves
    W = W[:: -(-len(W) // JUDGED)]
    sums = [_judged(W, one, other, ridges), _judged(W, other, one, ridges)]
    a, b = (jnp.add(*both) for both in zip(*sums, strict=True))
    if not bool((b > 0).all() & jnp.isfinite(a).all()):
        return CAUTIOUS
    alpha = jnp.clip(a / b, 0.0, 1.0)
    best = int(jnp.argmax(2 * alpha * a - alpha * alpha * b))
    return Strength(float(alpha[best]), RIDGES[best])
