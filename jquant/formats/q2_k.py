"""Q2_K: 256 weights share d and dmin; each 16 share 4-bit sc and m: w ≈ d·sc·q − dmin·m, q in [0, 3].

Block, 84 bytes: sc | m << 4 (16), qs 64, d float16, dmin float16. 2.625 bits per weight.
Of each half of 128 weights, byte l of 32 holds weights l, l + 32, l + 64, l + 96, the first in the low bits.
Source: llama.cpp, ggml/src/ggml-quants.c, dequantize_row_q2_K; ggml-common.h, block_q2_K.
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
    groups=16,
    q_max=3,
    sc_max=15,
    # Chosen greedily from a grid for the least error on Gaussian, Student-t and trained weights.
    starts=(
        (-0.1, 0.0), (0.5, 0.0), (0.5, 0.2), (0.6, 0.5), (0.6, 0.8), (0.8, -0.1), (1.4, 0.6), (1.4, 0.9),
    ),
    tops=_scale_min.tops(12.0, 16.0, 8),
)  # fmt: skip


def pack(codes: UInt8[Array, "256 n"], scales: _scale_min.Scales) -> UInt8[Array, "84 n"]:
    d, dmin, sc, m = scales
    qs = joined_bits(codes.reshape(2, 4, 32, -1), 2, axis=1)  # [half, quarter, l, n]
    return stacked_bytes(sc | m << 4, qs.reshape(64, -1), f16_bytes(d), f16_bytes(dmin))


def unpack(data: UInt8[Array, "84 n"]) -> tuple[UInt8[Array, "256 n"], _scale_min.Scales]:
    sc_m, qs, d_dmin = jnp.split(data, (16, 80))
    qs = qs.reshape(2, 1, 32, -1)
    codes = jnp.concatenate([qs >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(256, -1)
    return codes, _scale_min.Scales(*_scale_min.unpack_d_dmin(d_dmin), sc_m & 15, sc_m >> 4)


Q2_K = Format(
    name="Q2_K",
    ggml_type=10,
    block_size=256,
    block_bytes=84,
    fit=partial(_scale_min.fit, layout=LAYOUT),
    assign=partial(_scale_min.assign, layout=LAYOUT),
    reconstruct=_scale_min.reconstruct,
    pack=pack,
    unpack=unpack,
)
