"""Encoding and decoding superblocks of 256 weights in tests, with one compilation for each format."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import Effort, Format, QuantizedTensor, dequantize, quantize

BLOCKS = 1 << 11


def padded(x: np.ndarray, to: int = BLOCKS) -> jax.Array:
    """x as [`to`, size of a block], so that each format is compiled once for all tests."""
    return jnp.asarray(np.concatenate([x, np.zeros((to - len(x), x.shape[1]), x.dtype)]))


def encode(
    format: Format,
    x: np.ndarray,
    importance: np.ndarray | None = None,
    *,
    to: int = BLOCKS,
    effort: Effort = "fast",
) -> np.ndarray:
    """x [..., cols], importance [cols] or of x's shape → uint8 [blocks, block bytes]; to: as `padded`."""
    blocks, w = x.reshape(-1, format.block_size), None
    if importance is not None:
        w = padded(np.broadcast_to(importance, x.shape).reshape(blocks.shape), to)
    data = quantize(padded(blocks, to), format, w, effort=effort).parts["blocks"]
    return np.asarray(data)[: len(blocks)]


def decode(format: Format, data: np.ndarray) -> np.ndarray:
    """uint8 [blocks, block bytes] → float32 [blocks, 256]."""
    return np.asarray(dequantize(QuantizedTensor({"blocks": padded(data)}, format)))[: len(data)]
