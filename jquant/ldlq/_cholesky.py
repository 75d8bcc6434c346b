"""Cholesky factors, and solutions, of positive definite matrices of any width, compiled once.

For a CPU and for CUDA these are library calls. For a TPU XLA writes them out panel after panel: to compile
the factor of 2048 columns takes half a minute, 8 times as long as that of 1024. There a loop goes over the
panels. Each step computes whole columns and uses those below the panel, so that all steps have one shape: six
times the least operations of the factor, twice those of a solution, nearly all of them products.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from jaxtyping import Float

PANEL = 256  # columns

PRECISION = lax.Precision.HIGHEST


def cholesky(A: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The lower triangular L of A = L Lᵀ; of an A that is not positive definite no numbers."""
    return lax.platform_dependent(A, tpu=by_panels, default=jnp.linalg.cholesky)


def solve(A: Float[Array, "n n"], B: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """X of A X = B for a positive definite A."""
    return lax.platform_dependent(A, B, tpu=solve_by_panels, default=_solve)


def _solve(A: Float[Array, "n n"], B: Float[Array, "n m"]) -> Float[Array, "n m"]:
    return cho_solve(cho_factor(A), B)


def by_panels(A: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`cholesky`, by a loop."""
    return _factor(_padded(A))[: len(A), : len(A)]


def solve_by_panels(A: Float[Array, "n n"], B: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """`solve`, by loops."""
    L = _factor(_padded(A))
    X = jnp.pad(B, ((0, len(L) - len(B)), (0, 0)))
    rows, panels = jnp.arange(len(L))[:, None], len(L) // PANEL

    def forward(i: Array, X: Array) -> Array:
        start = i * PANEL
        columns = lax.dynamic_slice(L, (0, start), (len(L), PANEL))
        own = lax.dynamic_slice_in_dim(columns, start, PANEL)
        found = solve_triangular(own, lax.dynamic_slice_in_dim(X, start, PANEL), lower=True)
        below = jnp.where(rows >= start + PANEL, columns, 0.0)
        X = X - jnp.matmul(below, found, precision=PRECISION)
        return lax.dynamic_update_slice_in_dim(X, found, start, 0)

    def backward(i: Array, X: Array) -> Array:
        start = (panels - 1 - i) * PANEL
        across = lax.dynamic_slice_in_dim(L, start, PANEL)
        own = lax.dynamic_slice(across, (0, start), (PANEL, PANEL))
        part = lax.dynamic_slice_in_dim(X, start, PANEL)
        found = solve_triangular(own, part, lower=True, trans=1)
        above = jnp.where(rows < start, across.T, 0.0)
        X = X - jnp.matmul(above, found, precision=PRECISION)
        return lax.dynamic_update_slice_in_dim(X, found, start, 0)

    X = lax.fori_loop(0, panels, forward, X)
    return lax.fori_loop(0, panels, backward, X)[: len(B)]


def _padded(A: Float[Array, "n n"]) -> Float[Array, "size size"]:
    """To whole panels, by ones on the diagonal."""
    more = -len(A) % PANEL
    ones = jnp.where(jnp.arange(len(A) + more) < len(A), 0.0, 1.0)
    return jnp.pad(A, ((0, more), (0, more))) + jnp.diag(ones)


def _factor(A: Float[Array, "size size"]) -> Float[Array, "size size"]:
    rows = jnp.arange(len(A))[:, None]

    def step(i: Array, A: Array) -> Array:
        start = i * PANEL
        columns = lax.dynamic_slice(A, (0, start), (len(A), PANEL))
        own = jnp.linalg.cholesky(lax.dynamic_slice_in_dim(columns, start, PANEL))
        below = solve_triangular(own, columns.T, lower=True).T  # of X ownᵀ = columns
        below = jnp.where(rows >= start + PANEL, below, 0.0)
        A = A - jnp.matmul(below, below.T, precision=PRECISION)
        return lax.dynamic_update_slice(A, lax.dynamic_update_slice_in_dim(below, own, start, 0), (0, start))

    return jnp.tril(lax.fori_loop(0, len(A) // PANEL, step, A))
