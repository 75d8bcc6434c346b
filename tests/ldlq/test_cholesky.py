"""Cholesky factors and solutions by a loop over panels, as a TPU computes them: NumPy's in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.ldlq._cholesky import PANEL, by_panels, cholesky, solve, solve_by_panels

WIDTHS = [pytest.param(width, marks=pytest.mark.every) for width in (100, 2 * PANEL)] + [1, PANEL, 700]


def positive(width: int) -> np.ndarray:
    """As a Hessian of few samples is: some directions without any, but for the damping."""
    x = np.random.default_rng(width).normal(size=(max(width // 2, 1), width)).astype(np.float32)
    return x.T @ x / len(x) + 0.01 * np.eye(width, dtype=np.float32)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_factor_is_numpys(width):
    A = positive(width)
    expected = np.linalg.cholesky(A.astype(np.float64))
    for function in (by_panels, cholesky):
        L = np.asarray(jax.jit(function)(jnp.asarray(A)))
        np.testing.assert_array_equal(L, np.tril(L))
        np.testing.assert_allclose(L, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(L @ L.T, A, rtol=0, atol=1e-5 * np.abs(A).max())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_solution_is_numpys(width):
    A, B = positive(width), np.random.default_rng(1).normal(size=(width, 3)).astype(np.float32)
    expected = np.linalg.solve(A.astype(np.float64), B)
    for function in (solve_by_panels, solve):
        X = np.asarray(jax.jit(function)(jnp.asarray(A), jnp.asarray(B)))
        np.testing.assert_allclose(X, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_what_is_not_positive_gives_no_numbers():
    A = positive(700)
    A[500, 500] = -1
    assert np.isnan(np.asarray(by_panels(jnp.asarray(A)))).any()
    assert np.isnan(np.asarray(solve_by_panels(jnp.asarray(A), jnp.ones((700, 1))))).any()
