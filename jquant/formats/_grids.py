"""Codebooks of the IQ types, and the arithmetic that the types with a codebook share.

Terms. A **group** is the 8 or 4 consecutive weights that one codeword covers; the **grid** is the codebook,
[codewords, group]; an **index** chooses a codeword; **signs** is a byte per group, bit j for weight j.
The grids are those of llama.cpp (ggml-common.h), read from the gguf package when first needed.
"""

from __future__ import annotations

from functools import cache

import gguf.quants
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


@cache
def grid(name: str) -> np.ndarray:
    """The codebook of a type, int8 [codewords, group]: grid("IQ2_XXS") is [256, 8]."""
    codebook = getattr(gguf.quants, name)
    codebook.init_grid()
    values = codebook.grid.reshape(codebook.grid_shape).astype(np.int8)
    values.flags.writeable = False
    return values


@cache
def _words(name: str) -> np.ndarray:
    """The codebook with 4 weights in each little-endian word: int32 [group / 4, codewords]."""
    return np.ascontiguousarray(grid(name).view("<i4").T)


def lookup(name: str, index: Array) -> Array:
    """Codewords by index: int32 […, n] → float32 [… · group, n], in the order of the weights."""
    halves = [jnp.asarray(half).at[index].get(mode="promise_in_bounds") for half in _words(name)]
    # The barrier makes the gather a step of its own; fused, it would be done again for each of the 4 bytes.
    words = lax.optimization_barrier(jnp.stack(halves, axis=-2))  # […, group / 4, n]
    shift_left = jnp.arange(24, -1, -8, dtype=jnp.int32)[:, None]
    shift_left = shift_left.reshape((1,) * (words.ndim - 1) + (4, 1))
    values = words[..., None, :] << shift_left >> 24  # sign-extends each byte: […, group / 4, 4, n]
    return values.reshape(-1, values.shape[-1]).astype(jnp.float32)


def negate_where(signs: Array, values: Array) -> Array:
    """Negate value j of each group whose bit j is set: uint8 [groups, n], float32 [weights, n]."""
    groups, n = signs.shape
    group = values.shape[0] // groups
    bit = jnp.left_shift(jnp.uint8(1), jnp.arange(group, dtype=jnp.uint8))[None, :, None]
    values = values.reshape(groups, group, n)
    return jnp.where(signs[:, None] & bit != 0, -values, values).reshape(-1, n)


def scaled(d: Array, values: Array) -> Array:
    """Product with a scale per run of weights: float32 [runs, n] · [weights, n]."""
    runs, n = d.shape
    return (d[:, None] * values.reshape(runs, -1, n)).reshape(-1, n)


def even_signs(low: Array) -> Array:
    """The 8 sign bits that 7 stored ones stand for: the last makes the number of minuses even. uint8."""
    return low | (lax.population_count(low) & 1) << 7


def bit_fields(word: Array, width: int, count: int) -> Array:
    """`count` fields of `width` bits, lowest first: integer [k, n] → the same type [k · count, n]."""
    k, n = word.shape
    shifts = jnp.arange(0, width * count, width).astype(word.dtype)[None, :, None]
    mask = jnp.array((1 << width) - 1, word.dtype)
    return (word[:, None] >> shifts & mask).reshape(k * count, n)


def join_fields(fields: Array, width: int, count: int) -> Array:
    """The inverse of bit_fields: [k · count, n] → [k, n]. Fields must fit their width."""
    k, n = fields.shape[0] // count, fields.shape[1]
    shifts = jnp.arange(0, width * count, width).astype(fields.dtype)[None, :, None]
    return jnp.sum(fields.reshape(k, count, n) << shifts, axis=1, dtype=fields.dtype)


def words_from_bytes(data: Array, dtype: type) -> Array:
    """uint8 [k · size, n], little endian → unsigned integers [k, n] of that size."""
    return join_fields(data.astype(dtype), 8, jnp.dtype(dtype).itemsize)


def words_to_bytes(words: Array) -> Array:
    """Unsigned integers [k, n] → uint8 [k · size, n], little endian."""
    return bit_fields(words, 8, words.dtype.itemsize).astype(jnp.uint8)


def halves_from_nibbles(data: Array, run: int) -> Array:
    """uint8 [run / 2 · k, n] → codes [run · k, n]: low nibbles are a run's first half, high its second."""
    data = data.reshape(-1, 1, run // 2, data.shape[1])
    return jnp.concatenate([data & 15, data >> 4], axis=1).reshape(-1, data.shape[-1])


def nibbles_from_halves(codes: Array, run: int) -> Array:
    """The inverse of halves_from_nibbles."""
    halves = codes.reshape(-1, 2, run // 2, codes.shape[1])
    return (halves[:, 0] | halves[:, 1] << 4).reshape(-1, codes.shape[1])
