"""Floating-point types, one weight a block: F32, F16, BF16, and the 8-bit floats of safetensors.

Rounding is to nearest, ties to even, as in ggml. F8 types are read, not written: GGUF has none.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt8

from jquant.core import Format


def fit(blocks: Float[Array, "1 n"], importance: Float[Array, "1 n"] | None) -> tuple[()]:
    """No scales."""
    return ()


def assign(blocks: Float[Array, "1 n"], importance: Float[Array, "1 n"] | None, scales: tuple[()]) -> Array:
    """The weights themselves: `pack` rounds them."""
    return blocks


def reconstruct(codes: Array, scales: tuple[()]) -> Float[Array, "1 n"]:
    return codes


def pack(codes: Float[Array, "1 n"], scales: tuple[()], dtype: np.dtype) -> UInt8[Array, "bytes n"]:
    bits = lax.bitcast_convert_type(codes[0].astype(dtype), jnp.uint8)  # [n, bytes]
    return bits.T


def pack_bf16(codes: Float[Array, "1 n"], scales: tuple[()]) -> UInt8[Array, "2 n"]:
    """Round the upper half of the bits to nearest even; a NaN becomes quiet, subnormals are kept."""
    bits = lax.bitcast_convert_type(codes[0], jnp.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    half = jnp.where(is_nan, bits >> 16 | 64, rounded)
    return lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.uint8).T  # [2, n]


def unpack(data: UInt8[Array, "bytes n"], dtype: np.dtype) -> tuple[Array, tuple[()]]:
    shape = data.T if dtype.itemsize > 1 else data[0]
    return lax.bitcast_convert_type(shape, dtype).astype(jnp.float32)[None], ()


def _plain(name: str, ggml_type: int | None, scalar: type) -> Format:
    dtype = jnp.dtype(scalar)
    size = dtype.itemsize
    write = {} if ggml_type is None else {"fit": fit, "assign": assign}
    return Format(
        name=name,
        ggml_type=ggml_type,
        block_size=1,
        block_bytes=size,
        reconstruct=reconstruct,
        pack=pack_bf16 if name == "BF16" else partial(pack, dtype=dtype),
        unpack=partial(unpack, dtype=dtype),
        **write,
    )


F32 = _plain("F32", 0, jnp.float32)
F16 = _plain("F16", 1, jnp.float16)
BF16 = _plain("BF16", 30, jnp.bfloat16)
F8_E4M3 = _plain("F8_E4M3", None, jnp.float8_e4m3fn)
F8_E5M2 = _plain("F8_E5M2", None, jnp.float8_e5m2)
