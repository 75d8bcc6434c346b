"""The search for codewords as one kernel for CUDA GPUs.

XLA splits its thousands of steps, each of a few arrays [lanes], into dozens of kernels that pass hundreds of
such arrays through memory. Here a thread takes a lane through all of them and keeps what lies between.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from jquant.core import result_like

TILE = 128  # lanes of a program, one for each of its threads


def over_lanes(
    function: Callable[..., Array], *arrays: Array, interpret: bool = False
) -> Int[Array, " lanes"]:
    """function(*arrays), int32, computed lane by lane.

    arrays: [lanes] or [n, lanes], the latter given to the function as n arrays. interpret: run as plain JAX.
    """
    from jax.experimental import pallas as pl  # takes a while, and only GPUs need it
    from jax.experimental.pallas import triton

    lanes = arrays[0].shape[-1]
    padded = [jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, -lanes % TILE)]) for a in arrays]

    def kernel(*references) -> None:
        *given, out = references
        rows = [ref[...] if ref.ndim == 1 else [ref[j] for j in range(ref.shape[0])] for ref in given]
        out[...] = function(*rows)

    def tile(a: Array):
        above = a.shape[:-1]
        return pl.BlockSpec((*above, TILE), lambda i: (*(0 for _ in above), i))

    made = pl.pallas_call(
        kernel,
        out_shape=result_like(padded[0].shape[-1:], jnp.int32, *padded),
        grid=(padded[0].shape[-1] // TILE,),
        in_specs=[tile(a) for a in padded],
        out_specs=pl.BlockSpec((TILE,), lambda i: (i,)),
        compiler_params=None if interpret else triton.CompilerParams(num_warps=TILE // 32, num_stages=1),
        interpret=interpret,
    )(*padded)
    return made[:lanes]
