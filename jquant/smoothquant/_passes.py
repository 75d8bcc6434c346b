"""Samples on their way through the blocks of the original, and what the matrices to smooth are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.calibration import embed_into, real_tokens, weights_of
from jquant.models import Block, Decoder, Parameters
from jquant.smoothquant import _smooth as smooth
from jquant.smoothquant._block_error import Data
from jquant.text.samples import Samples

BATCH = 4  # samples through a block at once


class Passed(NamedTuple):
    data: Data
    shown: dict[str, Array]  # what the block's matrices are given, by place: [s · t, width]


def cut(samples: Samples, part: slice, tokens: int) -> tuple[Int[np.ndarray, "s t"], Int[np.ndarray, " s"]]:
    """So many tokens of each of a part of the samples, and how many of them are real."""
    ids = samples.tokens[part, :tokens]
    return ids, np.minimum(real_tokens(samples.tokens, samples.lengths)[part], ids.shape[1])


def embedded(
    decoder: Decoder, samples: Samples, part: slice, tokens: int
) -> tuple[Float[Array, "s t width"], Int[Array, " s"]]:
    """What goes into the first block of a part of the samples, so many tokens of each; their real tokens."""
    ids, lengths = cut(samples, part, tokens)
    x = np.empty((*ids.shape, decoder.width), np.float32)
    embed_into(x, decoder, ids)
    return jnp.asarray(x), jnp.asarray(lengths, jnp.int32)


def through_blocks(
    decoder: Decoder,
    samples: Samples,
    parts: Sequence[slice],
    tokens: int,
    fisher: Sequence[Float[np.ndarray, "blocks s t"] | None],
) -> Iterator[tuple[int, Block, Parameters, Array, list[Passed]]]:
    """Block after block its number, parameters and angles, and what goes through it of each part of the
    samples, so many tokens of each. fisher: of each part, where it is known."""
    x, real = zip(*(embedded(decoder, samples, part, tokens) for part in parts), strict=True)
    for i, block in enumerate(decoder.blocks):
        params, angles = decoder.load_block(i), jnp.asarray(decoder.angles(i, x[0].shape[1]))
        felt = [None if known is None else jnp.asarray(known[i]) for known in fisher]
        passed = [through(block, params, *one, angles) for one in zip(x, real, felt, strict=True)]
        yield i, block, params, angles, passed
        x = tuple(one.data.y for one in passed)


def through(
    block: Block,
    params: Parameters,
    x: Array,
    real: Array,
    fisher: Float[Array, "s t"] | None,
    angles: Array,
) -> Passed:
    """All samples through the block."""
    # Tokens come to a stack's experts tile by tile, to its router all and in order.
    dense = {
        place.name: next(n for n in place.consumers if params[n]["weight"].ndim == 2)
        for place in smooth.couplings(block)
        if place.experts is None
    }
    batches = [
        _step(block, params, x[k : k + BATCH], angles, tuple(dense.values())) for k in range(0, len(x), BATCH)
    ]
    ys, given = zip(*batches, strict=True)
    shown = {place: jnp.concatenate([one[name] for one in given]) for place, name in dense.items()}
    y, weight = jnp.concatenate(ys), weights_of(x, real)
    if fisher is None:
        size = jnp.sum(jnp.square(y), axis=-1).reshape(-1)
        return Passed(Data(x, y, weight, weight / jnp.where(size > 0, size, 1.0)), shown)
    return Passed(Data(x, y, weight, fisher.reshape(-1)), shown)


@partial(jax.jit, static_argnums=(0, 4))
def _step(
    block: Block, params: Parameters, x: Array, angles: Array, names: tuple[str, ...]
) -> tuple[Array, dict[str, Array]]:
    """What comes out, and what these matrices are given, [n, width]."""
    y, found = block.apply({"params": params}, x, angles, mutable="inputs")
    shown = {name: cast(Array, found["inputs"][name]["x"]) for name in names}
    return cast(Array, y), {name: a.reshape(-1, a.shape[-1]) for name, a in shown.items()}
