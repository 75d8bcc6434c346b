"""A slab of rows from one stored type to another, as one compiled loop per pair of types.

The loop's step handles CHUNK_WEIGHTS weights, and its length is an argument: every tensor of a model,
whatever its shape, runs the same executable. A short last step is padded with zeros, which no block shares
with weights, since rows are whole blocks.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax

from jquant.core import CHUNK_WEIGHTS, Format, decode_chunk, encode_chunk

SLAB_WEIGHTS = 1 << 22  # 16 MB as float32: many steps of the loop, small beside any budget of memory
SLAB_STEPS = SLAB_WEIGHTS // CHUNK_WEIGHTS

# Stored types that the compiled code reads as arrays of floats rather than as bytes.
FLOAT_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


# Types with at most these bits a weight are read back: what they lose can be what makes a model fail.
LOW_BPW = 3.5


class Encoded(NamedTuple):
    data: np.ndarray  # uint8 [rows, row bytes]
    largest: float  # magnitude of the weights read; infinite where one is no finite number
    loss: float  # Σ w (x − x̂)² of the bytes as written, w importance or 1; 0 above LOW_BPW
    total: float  # Σ w x²; 0 above LOW_BPW


def slab_rows(cols: int) -> int:
    """Rows of one slab: as many as SLAB_WEIGHTS holds, at least one."""
    return max(SLAB_WEIGHTS // cols, 1)


def transcode(
    data: np.ndarray, source: Format, target: Format, importance: np.ndarray | None = None
) -> Encoded:
    """Rows of stored bytes, uint8 [rows, row bytes], from `source` to `target`.

    importance: float32 [rows, cols] or a shape that broadcasts to it, or None.
    """
    rows = data.shape[0]
    cols = data.shape[1] // source.block_bytes * source.block_size
    steps = -(-rows * cols // CHUNK_WEIGHTS)
    capacity = max(steps, SLAB_STEPS)
    stored = data.reshape(-1).view(FLOAT_DTYPES.get(source.name, np.uint8))
    slab = _padded(stored, CHUNK_WEIGHTS * stored.size // (rows * cols), capacity)
    weights = None
    if importance is not None:
        weights = _padded(np.broadcast_to(importance, (rows, cols)).reshape(-1), CHUNK_WEIGHTS, capacity)
    out, *found = _transcode(slab, weights, np.int32(steps), source, target)
    row_bytes = cols // target.block_size * target.block_bytes
    data = np.asarray(out).reshape(-1)[: rows * row_bytes].reshape(rows, row_bytes)
    return Encoded(data, *map(float, found))


def _padded(flat: np.ndarray, step: int, capacity: int) -> np.ndarray:
    """flat as [capacity, step]; what lies beyond the steps in use is never read."""
    out = np.empty((capacity, step), flat.dtype)
    out.reshape(-1)[: flat.size] = flat
    out.reshape(-1)[flat.size : -(-flat.size // step) * step] = np.zeros((), flat.dtype)
    return out


# Searches are bound by arithmetic, so vectors of 512 bits, where the processor has them, gain over XLA's 256.
@partial(
    jax.jit,
    static_argnames=("source", "target"),
    compiler_options={"xla_cpu_prefer_vector_width": 512},
)
def _transcode(
    slab: Array, importance: Array | None, steps: Array, source: Format, target: Format
) -> tuple[Array, Array, Array, Array]:
    """[capacity, step] stored values → uint8 [capacity, blocks, bytes] of `steps`; the rest of Encoded."""
    out = jnp.zeros((slab.shape[0], CHUNK_WEIGHTS // target.block_size, target.block_bytes), jnp.uint8)

    def weights(stored: Array) -> Array:
        if source.name in FLOAT_DTYPES:
            return stored.astype(jnp.float32)
        return decode_chunk(source, stored.reshape(-1, source.block_bytes)).reshape(-1)

    def step(i: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        out, largest, loss, total = carry
        x = weights(slab[i])
        blocks = [x.reshape(-1, target.block_size)]
        if importance is not None:
            blocks.append(importance[i].reshape(-1, target.block_size))
        data = encode_chunk(target, *blocks)
        # A maximum may pass over NaN, so NaN becomes infinity first.
        magnitude = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf))
        if target.bpw <= LOW_BPW:
            w = blocks[1] if importance is not None else jnp.float32(1)
            rest = blocks[0] - decode_chunk(target, data)
            loss, total = loss + jnp.sum(w * rest * rest), total + jnp.sum(w * blocks[0] * blocks[0])
        return out.at[i].set(data), jnp.maximum(largest, magnitude), loss, total

    return lax.fori_loop(0, steps, step, (out, jnp.float32(0), jnp.float32(0), jnp.float32(0)))
