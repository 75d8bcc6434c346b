"""FP8: each row has a scale, w ≈ s q with q an e4m3 float of magnitude 448 at most.

    weight float8_e4m3fn [rows, cols] | weight_scale [rows, 1]

A float's relative error depends on where a weight lies between powers of two: the search tries scales over
one octave. Source: compressed-tensors, format float-quantized, strategy channel, symmetric.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jquant.core import ScaledFormat
from jquant.formats._clip import as_it_is, divided, fit_scale, reconstruct

LARGEST = 448.0
CLIPS = tuple(np.exp2(-np.arange(32) / 32).tolist())


def assign(groups: Float[Array, "n g"], scales: Float[Array, " n"]) -> Float[Array, "n g"]:
    """Beyond the largest number this type knows only NaN."""
    q = jnp.clip(divided(groups, scales), -LARGEST, LARGEST)
    return q.astype(jnp.float8_e4m3fn)


FP8 = ScaledFormat(
    name="FP8",
    bits=8,
    type="F8_E4M3",
    fit=partial(fit_scale, clips=CLIPS, largest=LARGEST, assign=assign),
    assign=assign,
    reconstruct=reconstruct,
    pack=as_it_is,
    unpack=as_it_is,
)
