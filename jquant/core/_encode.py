"""`quantize` and `dequantize`: arrays to bytes and back, whatever transforms them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt8

from jquant.core._effort import Effort, at_effort
from jquant.core._files import FLOAT_DTYPES
from jquant.core._format import Format, QuantizedTensor, ScaledFormat
from jquant.core._grain import CPU_GRAIN, grain


def encode_chunk(
    format: Format,
    blocks: Float[Array, "n B"],
    importance: Float[Array, "n B"] | None = None,
    tile: int | None = None,
) -> UInt8[Array, "n bytes"]:
    """One step of the loop: a few blocks to bytes, in the layout of a file (one block a row).

    tile: of a device's `Grain`; default: of the devices in use.
    """
    fit, assign = format.fit, format.assign
    assert fit is not None
    assert assign is not None
    # The barrier keeps the caller's arithmetic out of the search: fused with it, x·a − b would become one
    # rounded operation instead of two, and bytes would depend on who calls.
    blocks, importance = lax.optimization_barrier((blocks, importance))
    n, B = blocks.shape
    tiles = n * B // (tile or grain().tile)
    if B == 1 or tiles == 0 or n % tiles:  # single weights need no transposition
        tiles = 1

    def tiled(a: Array) -> Array:
        # What a loop runs over lies in memory: the blocks are transposed once, not in every pass over them.
        return a.reshape(tiles, n // tiles, B).transpose(0, 2, 1)

    def encode(tile: tuple[Array, Array | None]) -> Array:
        # Without this barrier the arithmetic of the scales would be repeated for every weight of their group.
        scales = lax.optimization_barrier(fit(*tile))
        return format.pack(assign(*tile, scales), scales)

    data = lax.map(encode, (tiled(blocks), None if importance is None else tiled(importance)))
    return data.transpose(0, 2, 1).reshape(n, format.block_bytes)  # [tile, bytes, block] before


def decode_chunk(format: Format, data: UInt8[Array, "n bytes"]) -> Float[Array, "n B"]:
    """The inverse step: a few blocks of bytes to float32 weights."""
    return format.reconstruct(*format.unpack(lax.optimization_barrier(data).T)).T


def chunk_blocks(format: Format, blocks: int | None = None) -> int:
    """Blocks in one step of the loop; blocks: how many there are, so that a few do not make a large step."""
    least, most = (max(weights // format.block_size, 1) for weights in (CPU_GRAIN.chunk, grain().chunk))
    return most if blocks is None else max(min(most, -(-blocks // least) * least), 1)


def _over_chunks(step: Callable[..., Array], format: Format, *arrays: Array) -> Array:
    """step over [n, …] arrays, a chunk of rows at a time; the last step is padded with zeros."""
    n = arrays[0].shape[0]
    chunk = chunk_blocks(format, n)
    steps = -(-n // chunk)

    def split(a: Array) -> Array:
        return jnp.pad(a, ((0, steps * chunk - n), (0, 0))).reshape(steps, chunk, a.shape[1])

    out = lax.map(lambda args: step(*args), tuple(map(split, arrays)))  # [steps, chunk, out]
    return out.reshape(steps * chunk, out.shape[-1])[:n]


def _batched_by_rows(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` of arrays [n, …], whose `vmap` is the same function of more rows.

    Rows are independent, so a batch axis is only more of them. Without this, `vmap` would give the loop
    body another shape, another fusion, and now and then another last bit.
    """
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def rule(axis_size: int, in_batched: list[bool], *arrays: Array):
        def rows(a: Array, batched: bool) -> Array:
            a = a if batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            return a.reshape(axis_size * a.shape[1], *a.shape[2:])

        merged = [rows(a, batched) for a, batched in zip(arrays, in_batched, strict=True)]
        out = _batched_by_rows(function)(*merged)
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return wrapped


@partial(jax.jit, static_argnames="format")
def _encode(x: Array, importance: Array | None, format: Format) -> Array:
    *rows, cols = x.shape
    arrays = [x] if importance is None else [x, jnp.broadcast_to(importance, x.shape)]
    blocks = [a.astype(jnp.float32).reshape(-1, format.block_size) for a in arrays]
    step = partial(encode_chunk, format)
    data = _batched_by_rows(partial(_over_chunks, step, format))(*blocks)
    return data.reshape(*rows, cols // format.block_size * format.block_bytes)


@partial(jax.jit, static_argnames="format")
def _decode(data: Array, format: Format) -> Array:
    *rows, row_bytes = data.shape
    step = partial(decode_chunk, format)
    decode = _batched_by_rows(partial(_over_chunks, step, format))
    out = decode(data.reshape(-1, format.block_bytes))
    return out.reshape(*rows, row_bytes // format.block_bytes * format.block_size)


@partial(jax.jit, static_argnames="format")
def _encode_scaled(x: Array, importance: Array | None, format: ScaledFormat) -> dict[str, Array]:
    *rows, cols = x.shape
    groups = format.groups(cols)

    def grouped(a: Array) -> Array:
        return jnp.broadcast_to(a, x.shape).astype(jnp.float32).reshape(-1, cols // groups)

    found = format.fit(grouped(x), None if importance is None else grouped(importance))
    dtype = FLOAT_DTYPES[format.scale_type]
    stored = lax.optimization_barrier(jax.tree.map(lambda a: a.astype(dtype), found))
    codes = format.assign(grouped(x), jax.tree.map(lambda a: a.astype(jnp.float32), stored))
    by_name = zip(format.scale_parts, jax.tree.leaves(stored), strict=True)
    scales = {name: a.reshape(*rows, groups) for name, a in by_name}
    return {format.part: format.pack(codes.reshape(x.shape)), **scales}


@partial(jax.jit, static_argnames="format")
def _decode_scaled(parts: dict[str, Array], format: ScaledFormat) -> Array:
    codes = format.unpack(parts[format.part])
    scales = tuple(parts[name].astype(jnp.float32).reshape(-1) for name in format.scale_parts)
    groups = codes.reshape(scales[0].size, -1)
    return format.reconstruct(groups, scales if format.zeros else scales[0]).reshape(codes.shape)


def quantize(
    x: Float[Array, "*rows cols"],
    format: Format | ScaledFormat,
    importance: Float[Array, "..."] | None = None,
    *,
    effort: Effort = "fast",
) -> QuantizedTensor:
    """Encode `x`, whose last axis is a whole number of blocks.

    importance: weight of each weight's squared error, of x's shape or broadcast to it; [cols] is the
    imatrix of the layer's inputs. effort: see `at_effort`; a ScaledFormat has one search. The bytes are the
    same eagerly and under `jit`, `vmap`, `lax.map` and `shard_map`.

    Raises ValueError where the format cannot be encoded or the shapes do not fit.
    """
    _check(x, format, importance, effort)
    if isinstance(format, ScaledFormat):
        return QuantizedTensor(_encode_scaled(x, importance, format), format)
    return QuantizedTensor({"blocks": _encode(x, importance, at_effort(format, effort))}, format)


def _check(x: Array, format: Format | ScaledFormat, importance: Array | None, effort: str) -> None:
    """Raises ValueError, which names the argument, where `quantize` cannot take it."""
    scaled = isinstance(format, ScaledFormat)
    if not scaled and not format.can_encode:
        raise ValueError(f"format: {format.name} can be decoded but not encoded; choose another format.")
    block = format.group_size or 1 if scaled else format.block_size
    if x.ndim == 0 or x.shape[-1] % block:
        raise ValueError(
            f"x: {format.name} needs rows of a multiple of {block} weights; got shape {x.shape}. "
            "Choose a format with a smaller block for this tensor, such as Q8_0, or F16."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: weights are real numbers; got {x.dtype}. Convert it, x.astype('float32').")
    if effort not in get_args(Effort):
        raise ValueError(f"effort={effort!r}: not known; choose from {', '.join(get_args(Effort))}.")
    if importance is None:
        if not scaled and format.needs_importance:
            raise ValueError(f"{format.name} needs importance: pass the layer's imatrix, one value a column.")
        return
    try:
        fits = np.broadcast_shapes(importance.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"importance of shape {importance.shape} does not fit {x.shape}; pass one value a column."
        )


def dequantize(q: QuantizedTensor) -> Float[Array, "*rows cols"]:
    """The weights, float32 [*rows, cols], that a runtime sees; of GGUF's formats bit for bit ggml's.

    Raises ValueError where the bytes of a row are no whole number of blocks.

    >>> q = jquant.quantize(jnp.ones((2, 64)), "Q8_0")
    >>> jquant.dequantize(q).shape
    (2, 64)
    """
    if not isinstance(q, QuantizedTensor):
        raise ValueError(f"q: expected what quantize returned; got {type(q).__name__}.")
    if isinstance(q.format, ScaledFormat):
        return _decode_scaled(q.parts, q.format)
    shape, block = q.parts["blocks"].shape, q.format.block_bytes
    if not shape or shape[-1] % block:
        raise ValueError(f"q: {q.format.name} has rows of a multiple of {block} bytes; got shape {shape}.")
    return _decode(q.parts["blocks"], q.format)
