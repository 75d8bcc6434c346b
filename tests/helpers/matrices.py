"""Matrices and Hessians for error feedback, and the error that it makes less."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jquant import dequantize


def hessian(cols, tokens=2000, seed=0):
    """Of inputs whose columns go together, as activations do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols)) @ (
        np.eye(cols) + 2 * rng.standard_normal((cols, cols)) / cols**0.5
    )
    x *= np.exp(rng.standard_normal(cols))
    return jnp.asarray(x.T @ x / tokens, jnp.float32)


def matrix(rows, cols, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_t(5, (rows, cols)), jnp.float32)


def output_error(W, q, H):
    rest = np.asarray(W, np.float64) - np.asarray(dequantize(q), np.float64)
    return float(np.einsum("ri,ij,rj->", rest, np.asarray(H, np.float64), rest))
