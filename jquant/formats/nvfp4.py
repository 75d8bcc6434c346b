"""NVFP4, 4.5 bits per weight: 4-bit floats (E2M1) times an 8-bit float (E4M3) per 16.

Block of 64 weights, 36 bytes:

    d   uint8[4]            bytes 0–3, the scale of each 16 weights, E4M3 without its sign
    qs  4 × 8 bytes         bytes 4–35, for each 16 weights: weight j in the low nibble of byte j, weight
                            8 + j in the high one

w = d · (−1)^sign · {0, ½, 1, 1½, 2, 3, 4, 6}, the sign in the nibble's high bit; the code for −0 is +0.
The scale byte 127, NaN in E4M3, is 0, and the byte's high bit is ignored otherwise.
Source: ggml-common.h, block_nvfp4; ggml-quants.c, dequantize_row_nvfp4; ggml-impl.h, ggml_ue4m3_to_fp32.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, UInt8

from jquant.core import Format
from jquant.formats._blocks import inverse, zeros_along
from jquant.formats._e2m1 import MAGNITUDES, gain_of_scale, nearest_code
from jquant.formats._grids import halves_from_nibbles, nibbles_from_halves, scaled
from jquant.formats._levels import weights

LEVELS = np.array(MAGNITUDES, np.float32)
LEVELS = np.concatenate([LEVELS, 0 - LEVELS])  # 0 − 0 is +0


def scale_values() -> np.ndarray:
    """The scale that each byte stands for, float32 [256]. All are normal float32."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    return np.where(byte == 127, 0, values).astype(np.float32)


SCALES = scale_values()


# Scale bytes to try, relative to the one that makes the largest weight 6: 8 steps are an octave.
STEPS = range(-14, 7)


def fit(blocks: Float[Array, "64 n"], importance: Float[Array, "64 n"] | None) -> Int[Array, "4 n"]:
    """The scale of least weighted error for each 16 weights, of all that are worth a try."""
    n = blocks.shape[1]
    size = jnp.abs(blocks)
    peak = jnp.max(size, axis=0)[None, None]  # [1, 1, n]
    x = (size * inverse(peak[0])).reshape(4, 16, n)
    w = weights(blocks, importance).reshape(4, 16, n)
    top = jnp.max(size.reshape(4, 16, n), axis=1, keepdims=True) / 6  # [4, 1, n]
    values = jnp.asarray(SCALES[:127])
    first = jnp.sum(values[:, None, None, None] <= top[None], axis=0, dtype=jnp.int32) - 1

    def better(step: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        byte = jnp.clip(first + step, 0, 126)
        scale = values.at[byte].get(mode="promise_in_bounds") * inverse(peak)
        gains = gain_of_scale(x, w, scale)
        return jnp.maximum(gains, best[0]), jnp.where(gains > best[0], byte, best[1])

    zero = zeros_along(first)
    return lax.fori_loop(STEPS.start, STEPS.stop, better, (zeros_along(top), zero))[1][:, 0]


def assign(
    blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None, scales: Int[Array, "runs n"]
) -> Int[Array, "B n"]:
    n = blocks.shape[1]
    d = jnp.asarray(SCALES).at[scales].get(mode="promise_in_bounds")[:, None]
    return nearest_code(blocks.reshape(len(d), -1, n), d).reshape(-1, n)


def reconstruct(codes: Int[Array, "B n"], scales: Int[Array, "runs n"]) -> Float[Array, "B n"]:
    """scales are the file's bytes. The product is exact: 4 significant bits times 2."""
    d = jnp.asarray(SCALES).at[scales].get(mode="promise_in_bounds")
    return scaled(d, jnp.asarray(LEVELS).at[codes].get(mode="promise_in_bounds"))


def pack(codes: Int[Array, "64 n"], scales: Int[Array, "4 n"]) -> UInt8[Array, "36 n"]:
    return jnp.concatenate([scales.astype(jnp.uint8), nibbles_from_halves(codes.astype(jnp.uint8), 16)])


def unpack(data: UInt8[Array, "36 n"]) -> tuple[Int[Array, "64 n"], Int[Array, "4 n"]]:
    return halves_from_nibbles(data[4:], 16).astype(jnp.int32), data[:4].astype(jnp.int32)


NVFP4 = Format(
    name="NVFP4",
    ggml_type=40,
    block_size=64,
    block_bytes=36,
    fit=fit,
    assign=assign,
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
)
