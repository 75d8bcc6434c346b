"""SmoothQuant's factors for one matrix: for callers that have arrays, not a model."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.smoothquant._smooth import smooth


def scales(
    x: Float[Array, "*tokens cols"], w: Float[Array, "*rows cols"], alpha: float | Float[Array, ""] = 0.5
) -> Float[Array, " cols"]:
    """s_j = max|x_j|^α / max|w_j|^(1−α) of each input channel j, divided by the geometric mean of all.

    The layer computes the same with the outliers of x moved into w: y = w x = (w diag(s)) (diag(s)⁻¹ x). A
    common factor changes nothing, for the scales of 8 bits take it up. A channel that is 0 in x or w has
    s = 1, and no s is farther from 1 than 10⁴. Runs under `jit` and `vmap`.

    Args:
        x: inputs of the layer, or [cols], the largest magnitude of each channel.
        w: its weights.
        alpha: how much of the outliers moves, 0 to 1.

    Raises:
        ValueError: x and w have other channels, or alpha is out of its range.

    Source: Xiao et al. 2023, SmoothQuant, equation 4.

    >>> x, w = jnp.array([[100.0, -1.0], [-4.0, 1.0]]), jnp.array([[1.0, 1.0]])
    >>> s = jquant.smoothquant.scales(x, w, 0.5)
    >>> jnp.max(jnp.abs(x / s[None]), axis=0) / jnp.max(jnp.abs(w * s[None]), axis=0)  # alike
    Array([10., 10.], dtype=float32)
    """
    if x.ndim == 0 or w.ndim == 0 or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"x of shape {x.shape} and w of shape {w.shape}: their last axes are a layer's input channels, "
            "as many in both."
        )
    if isinstance(alpha, float | int) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: needs to be from 0 to 1.")
    return jnp.exp(smooth(_largest(x), _largest(w), alpha))


def _largest(a: Float[Array, "*n cols"]) -> Float[Array, " cols"]:
    """The largest magnitude of each channel."""
    return jnp.max(jnp.abs(a.astype(jnp.float32)).reshape(-1, a.shape[-1]), axis=0)
