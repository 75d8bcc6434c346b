"""Q4_K: 256 weights share d and dmin; each 32 share 6-bit sc and m: w ≈ d·sc·q − dmin·m, q in [0, 15].

Block, 144 bytes: d float16, dmin float16, sc and m 12 (see `pack_6_bit`), qs 128. 4.5 bits per weight.
Byte l of the k-th 32 of qs holds q of weights 64 k + l (low nibble) and 64 k + 32 + l.
Source: llama.cpp, ggml/src/ggml-quants.c, dequantize_row_q4_K; ggml-common.h, block_q4_K.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import UInt8

from jquant.core import Format
from jquant.formats import _scale_min
from jquant.formats._blocks import f16_bytes, joined_bits, stacked_bytes

LAYOUT = _scale_min.Layout(
    groups=8,
    q_max=15,
    sc_max=63,
    # Chosen greedily from a grid for the least error on Gaussian, Student-t and trained weights.
    starts=((-0.6, 0.2), (0.0, -0.2), (0.0, 0.2), (0.4, 0.2), (0.6, 0.0), (0.6, 0.6)),
    tops=_scale_min.tops(55.0, 65.0, 16),
)


def pack(codes: UInt8[Array, "256 n"], scales: _scale_min.Scales) -> UInt8[Array, "144 n"]:
    d, dmin, sc, m = scales
    qs = joined_bits(codes.reshape(4, 2, 32, -1), 4, axis=1)  # [64 weights, nibble, l, n]
    sc_m = _scale_min.pack_6_bit(sc, m)
    return stacked_bytes(f16_bytes(d), f16_bytes(dmin), sc_m, qs.reshape(128, -1))


def unpack(data: UInt8[Array, "144 n"]) -> tuple[UInt8[Array, "256 n"], _scale_min.Scales]:
    d_dmin, sc_m, qs = jnp.split(data, (4, 16))
    qs = qs.reshape(4, 1, 32, -1)
    codes = jnp.concatenate([qs & 15, qs >> 4], axis=1).reshape(256, -1)
    scales = (*_scale_min.unpack_d_dmin(d_dmin), *_scale_min.unpack_6_bit(sc_m))
    return codes, _scale_min.Scales(*scales)


Q4_K = Format(
    name="Q4_K",
    ggml_type=12,
    block_size=256,
    block_bytes=144,
    fit=partial(_scale_min.fit, layout=LAYOUT),
    assign=partial(_scale_min.assign, layout=LAYOUT),
    reconstruct=_scale_min.reconstruct,
    pack=pack,
    unpack=unpack,
)
