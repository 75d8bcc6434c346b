"""A slab of rows from one stored type to another, as one compiled loop per pair of types.

The loop's step handles one chunk of weights, and its length is an argument: every tensor of a model,
whatever its shape, runs the same executable. A short last step is padded with zeros, which no block shares
with weights, since rows are whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jquant.core import FLOAT_DTYPES, Format, Grain, decode_chunk, encode_chunk, grain
from jquant.distributed.shard_map import shard_map

SLAB_WEIGHTS = 1 << 22  # 16 MB as float32: many steps of a CPU's loop, small beside any budget of memory

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


def slab_steps(grain: Grain) -> int:
    """Steps of the loop for a slab."""
    return max(SLAB_WEIGHTS // grain.chunk, 1)


def transcode(
    data: np.ndarray,
    source: Format,
    target: Format,
    importance: np.ndarray | None = None,
    devices: Mesh | None = None,
) -> Encoded:
    """Rows of stored bytes, uint8 [rows, row bytes], from `source` to `target`.

    importance: float32 [rows, cols] or a shape that broadcasts to it, or None. devices: of this process, of
    one axis, that share the rows; default: one.
    """
    rows = data.shape[0]
    cols = data.shape[1] // source.block_bytes * source.block_size
    own = grain()
    steps, shares = -(-rows * cols // own.chunk), 1 if devices is None else devices.size
    each = -(-steps // shares)
    capacity = max(each, slab_steps(own))
    counts = np.clip(steps - each * np.arange(shares), 0, each).astype(np.int32)
    stored = data.reshape(-1).view(FLOAT_DTYPES.get(source.name, np.uint8))
    slab = _padded(stored, own.chunk * stored.size // (rows * cols), each, (shares, capacity))
    weights = None
    if importance is not None:
        flat = np.broadcast_to(importance, (rows, cols)).reshape(-1)
        weights = _padded(flat, own.chunk, each, (shares, capacity))
    if devices is None:
        out, *found = _on_one(source, target, own)(slab, weights, counts)
    else:
        out, *found = loop_over(devices, source, target, weights is not None, own)(slab, weights, counts)
    row_bytes = cols // target.block_size * target.block_bytes
    data = np.asarray(out).reshape(shares, capacity, -1)[:, :each].reshape(-1)
    data = data[: rows * row_bytes].reshape(rows, row_bytes)
    largest, loss, total = (np.asarray(a, np.float64) for a in found)  # [shares]
    return Encoded(data, float(largest.max()), float(loss.sum()), float(total.sum()))


def _padded(flat: np.ndarray, step: int, each: int, shape: tuple[int, int]) -> np.ndarray:
    """flat, `each` steps a share, as [shares · capacity, step] of shape (shares, capacity); what lies beyond
    the steps in use is never read."""
    out = np.empty((*shape, step), flat.dtype)
    for share, mine in enumerate(out):
        part = flat[share * each * step : (share + 1) * each * step]
        mine.reshape(-1)[: part.size] = part
        mine.reshape(-1)[part.size : -(-part.size // step) * step] = np.zeros((), flat.dtype)
    return out.reshape(-1, step)


def _loop(
    slab: Array, importance: Array | None, steps: Array, source: Format, target: Format, grain: Grain
) -> tuple[Array, Array, Array, Array]:
    """[capacity, step] stored values → uint8 [capacity, blocks, bytes] of `steps` [1]; the rest of Encoded,
    [1] each."""
    out = jnp.zeros((slab.shape[0], grain.chunk // target.block_size, target.block_bytes), jnp.uint8)

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
        data = encode_chunk(target, *blocks, tile=grain.tile)
        # A maximum may pass over NaN, so NaN becomes infinity first.
        magnitude = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf))
        if target.bpw <= LOW_BPW:
            w = blocks[1] if importance is not None else jnp.float32(1)
            rest = blocks[0] - decode_chunk(target, data)
            loss, total = loss + jnp.sum(w * rest * rest), total + jnp.sum(w * blocks[0] * blocks[0])
        return out.at[i].set(data), jnp.maximum(largest, magnitude), loss, total

    zero = jnp.float32(0)
    out, *found = lax.fori_loop(0, steps[0], step, (out, zero, zero, zero))
    largest, loss, total = (a[None] for a in found)
    return out, largest, loss, total


@cache
def _on_one(source: Format, target: Format, grain: Grain) -> Callable[..., tuple[Array, ...]]:
    """The loop on one device."""
    loop = partial(_loop, source=source, target=target, grain=grain)
    return jax.jit(loop, compiler_options=_options())


@cache
def loop_over(
    devices: Mesh, source: Format, target: Format, weighted: bool, grain: Grain
) -> Callable[..., tuple[Array, ...]]:
    """The loop on each device: it talks to no other."""
    rows = PartitionSpec(devices.axis_names[0])
    given = (rows, rows if weighted else None, rows)
    loop = partial(_loop, source=source, target=target, grain=grain)
    placed = NamedSharding(devices, rows)
    return jax.jit(
        shard_map(loop, devices, given, rows),
        in_shardings=(placed, placed if weighted else None, placed),
        compiler_options=_options(),
    )


def _options() -> dict[str, str | bool | int | float] | None:
    """Searches are bound by arithmetic, so vectors of 512 bits, where the processor has them, gain over
    XLA's 256."""
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
