"""INT4: each group of 128 weights of a row has a scale, w ≈ s q with q in [−8, 7]. What W4A16 decodes.

    weight_packed int32 [rows, cols / 8], the first code in the lowest 4 bits, each + 8
    weight_scale [rows, cols / 128] | weight_shape int64 [2]

Source: compressed-tensors, format pack-quantized, strategy group, symmetric.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int8, Int32

from jquant.core import ScaledFormat
from jquant.formats._clip import divided, fit_scale, reconstruct

SMALLEST, LARGEST, CODES = -8.0, 7.0, 8
# Scales from which the largest weight is clipped, to those that leave room for it.
CLIPS = tuple(np.linspace(0.6, 1.1, 51).tolist())


def assign(groups: Float[Array, "n g"], scales: Float[Array, " n"]) -> Int8[Array, "n g"]:
    return jnp.clip(jnp.round(divided(groups, scales)), SMALLEST, LARGEST).astype(jnp.int8)


def pack(codes: Int8[Array, "*rows cols"]) -> Int32[Array, "*rows cols/8"]:
    nibbles = (codes.astype(jnp.int32) + 8).astype(jnp.uint32).reshape(*codes.shape[:-1], -1, CODES)
    words = jnp.zeros(nibbles.shape[:-1], jnp.uint32)
    for i in range(CODES):
        words = words | nibbles[..., i] << (4 * i)
    return lax.bitcast_convert_type(words, jnp.int32)


def unpack(stored: Int32[Array, "*rows words"]) -> Int8[Array, "*rows cols"]:
    words = lax.bitcast_convert_type(stored, jnp.uint32)
    nibbles = jnp.stack([words >> (4 * i) & 15 for i in range(CODES)], axis=-1)
    return (nibbles.astype(jnp.int32) - 8).astype(jnp.int8).reshape(*stored.shape[:-1], -1)


INT4 = ScaledFormat(
    name="INT4",
    bits=4,
    group_size=128,
    part="weight_packed",
    type="I32",
    per_code=CODES,
    fit=partial(fit_scale, clips=CLIPS, largest=-SMALLEST, assign=assign),
    assign=assign,
    reconstruct=reconstruct,
    pack=pack,
    unpack=unpack,
)
