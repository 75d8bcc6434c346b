"""Encoding and decoding superblocks of 256 weights in tests, with one compilation for each format."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import Format, QuantizedTensor, dequantize, quantize

BLOCKS = 1 << 11


def padded(x: np.ndarray) -> jax.Array:
    """x as [2¹¹, size of a block], so that each format is compiled once for all tests."""
    return jnp.asarray(np.concatenate([x, np.zeros((BLOCKS - len(x), x.shape[1]), x.dtype)]))


def encode(format: Format, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """x [..., cols], importance [cols] or of x's shape → uint8 [blocks, block bytes]."""
    blocks = x.reshape(-1, 256)
    w = None if importance is None else padded(np.broadcast_to(importance, x.shape).reshape(-1, 256))
    return np.asarray(quantize(padded(blocks), format, w).parts["blocks"])[: len(blocks)]


def decode(format: Format, data: np.ndarray) -> np.ndarray:
    """uint8 [blocks, block bytes] → float32 [blocks, 256]."""
    return np.asarray(dequantize(QuantizedTensor({"blocks": padded(data)}, format)))[: len(data)]
