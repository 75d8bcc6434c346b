"""Q5_K: 256 weights share d and dmin; each 32 share 6-bit sc and m: w ≈ d·sc·q − dmin·m, q in [0, 31].

Block, 176 bytes: d float16, dmin float16, sc and m 12 (see `pack_6_bit`), qh 32, qs 128. 5.5 bits per weight.
Byte l of the k-th 32 of qs holds the low 4 bits of weights 64 k + l (low nibble) and 64 k + 32 + l; bit j of
qh[l] is the fifth of weight 32 j + l.
Source: llama.cpp, ggml/src/ggml-quants.c, dequantize_row_q5_K; ggml-common.h, block_q5_K.
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
    q_max=31,
    sc_max=63,
    # Chosen greedily from a grid for the least error on Gaussian, Student-t and trained weights.
    starts=((-1.4, -0.6), (-1.0, 0.2), (-0.8, 0.0), (0.0, 0.0), (0.2, -0.2), (0.4, 0.4)),
    tops=_scale_min.tops(55.0, 65.0, 16),
)


def pack(codes: UInt8[Array, "256 n"], scales: _scale_min.Scales) -> UInt8[Array, "176 n"]:
    d, dmin, sc, m = scales
    qh = joined_bits((codes >> 4).reshape(8, 32, -1), 1, axis=0)
    qs = joined_bits((codes & 15).reshape(4, 2, 32, -1), 4, axis=1)  # [64 weights, nibble, l, n]
    sc_m = _scale_min.pack_6_bit(sc, m)
    return stacked_bytes(f16_bytes(d), f16_bytes(dmin), sc_m, qh, qs.reshape(128, -1))


def unpack(data: UInt8[Array, "176 n"]) -> tuple[UInt8[Array, "256 n"], _scale_min.Scales]:
    d_dmin, sc_m, qh, qs = jnp.split(data, (4, 16, 48))
    qs = qs.reshape(4, 1, 32, -1)
    low = jnp.concatenate([qs & 15, qs >> 4], axis=1).reshape(8, 32, -1)
    high = jnp.stack([qh >> j & 1 for j in range(8)])
    scales = (*_scale_min.unpack_d_dmin(d_dmin), *_scale_min.unpack_6_bit(sc_m))
    return (low | high << 4).reshape(256, -1), _scale_min.Scales(*scales)


Q5_K = Format(
    name="Q5_K",
    ggml_type=13,
    block_size=256,
    block_bytes=176,
    fit=partial(_scale_min.fit, layout=LAYOUT),
    assign=partial(_scale_min.assign, layout=LAYOUT),
    reconstruct=_scale_min.reconstruct,
    pack=pack,
    unpack=unpack,
)
