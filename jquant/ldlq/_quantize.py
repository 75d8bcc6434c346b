"""One matrix with error feedback: `ldlq` for callers that have arrays, not a model."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jquant.core import Format, QuantizedTensor, ScaledFormat
from jquant.formats import format_of
from jquant.ldlq.ldlq import DAMPING, factor, feedback_rows, tiles_of
from jquant.ldlq.scaled import by_groups, taken_apart


def quantize(
    W: Float[Array, "rows cols"],
    H: Float[Array, "cols cols"],
    format: Format | ScaledFormat | str,
    *,
    damping: float = DAMPING,
) -> QuantizedTensor:
    """W in the format, its codes chosen for the least error of the layer's output, tr (W − Ŵ) H (W − Ŵ)ᵀ.

    Column after column, what a code lost is made up for by those that follow (LDLQ; the same as GPTQ). Runs
    under `jit` and `vmap`. Source: Chee et al. 2023, QuIP, theorem 1; Frantar et al. 2022.

    Args:
        W: the layer's weights, y = W x.
        H: Σ x xᵀ or E[x xᵀ] of its inputs, symmetric: "xtx" of `jquant.calibration.HESSIAN`.
        format: of FORMATS or SCALED_FORMATS, or its name. Importance is not asked for: H has it.
        damping: of the mean diagonal of H, added to its diagonal.

    Raises:
        ValueError: no format has this name, it cannot be encoded, or the shapes do not fit.

    >>> x = jax.random.normal(jax.random.key(0), (512, 64)) * jnp.linspace(0.1, 2, 64)[None]
    >>> W = jax.random.normal(jax.random.key(1), (8, 64))
    >>> fed, plain = jquant.ldlq.quantize(W, x.T @ x, "Q4_0"), jquant.quantize(W, "Q4_0")
    >>> lost = [float(jnp.sum((x @ (jquant.dequantize(q) - W).T) ** 2)) for q in (fed, plain)]
    >>> lost[0] < 0.9 * lost[1]
    True
    """
    chosen = format_of(format)
    if W.ndim != 2:
        raise ValueError(f"W: expected a matrix, [rows, cols]; got shape {W.shape}. Use vmap for a stack.")
    blocked = by_groups(chosen, W.shape[1]) if isinstance(chosen, ScaledFormat) else chosen
    _check(W, H, blocked)
    factors = factor(H.astype(jnp.float32), blocked.group_size, damping)
    tiles = tiles_of(W.astype(jnp.float32))
    data = lax.map(partial(feedback_rows, factors=factors, format=blocked), tiles)  # [tiles, tile, bytes]
    data = data.reshape(-1, data.shape[-1])[: len(W)]
    if isinstance(chosen, ScaledFormat):
        return taken_apart(data, chosen, blocked)
    return QuantizedTensor({"blocks": data}, chosen)


def _check(W: Array, H: Array, format: Format) -> None:
    """Raises ValueError, which names the argument, where `quantize` cannot take it."""
    if not format.can_encode:
        raise ValueError(f"format: {format.name} can be decoded but not encoded; choose another format.")
    if W.shape[1] % format.block_size:
        raise ValueError(
            f"W: {format.name} needs rows of a multiple of {format.block_size} weights; got shape {W.shape}. "
            "Choose a format with a smaller block, such as Q8_0."
        )
    if H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"H: expected [cols, cols] of W, {(W.shape[1], W.shape[1])}; got shape {H.shape}. "
            "It is x.T @ x of the inputs x [tokens, cols]."
        )
