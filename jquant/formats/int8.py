"""INT8: each row has a scale, w ≈ s q with q in [−127, 127]. What W8A8 multiplies as integers.

    weight int8 [rows, cols] | weight_scale [rows, 1]

Source: compressed-tensors, format int-quantized, strategy channel, symmetric.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8

from jquant.core import ScaledFormat
from jquant.formats._clip import as_it_is, divided, fit_scale, reconstruct

LARGEST = 127.0
# Near 1, for so many codes leave little to gain by clipping; the others are for rows with a few huge weights.
CLIPS = (0.7, 0.8, 0.9, 0.96, 0.97, 0.98, 0.99, 1.0)


def assign(groups: Float[Array, "n g"], scales: Float[Array, " n"]) -> Int8[Array, "n g"]:
    return jnp.clip(jnp.round(divided(groups, scales)), -LARGEST, LARGEST).astype(jnp.int8)


INT8 = ScaledFormat(
    name="INT8",
    bits=8,
    type="I8",
    fit=partial(fit_scale, clips=CLIPS, largest=LARGEST, assign=assign),
    assign=assign,
    reconstruct=reconstruct,
    pack=as_it_is,
    unpack=as_it_is,
)
