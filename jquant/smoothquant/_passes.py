"""Samples on their way through the blocks of the original, and what the matrices to smooth are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.calibration import batches, real_tokens, walk, weights_of
from jquant.models import Block, Decoder, Parameters, run_and_show
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
    return jnp.asarray(decoder.embed(ids)), jnp.asarray(lengths, jnp.int32)


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
    for at in walk(decoder, x[0].shape[1]):
        felt = [None if costs is None else jnp.asarray(costs[at.i]) for costs in fisher]
        block = decoder.blocks[at.i]
        passed = [through(block, at.params, *one, at.angles) for one in zip(x, real, felt, strict=True)]
        yield at.i, block, at.params, at.angles, passed
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
    names = tuple(dense.values())
    passed = [run_and_show(block, params, x[k], angles, names) for k in batches(len(x), BATCH)]
    ys, inputs = zip(*passed, strict=True)
    shown = {
        place: jnp.concatenate([one[name]["x"].reshape(-1, one[name]["x"].shape[-1]) for one in inputs])
        for place, name in dense.items()
    }
    y, weight = jnp.concatenate(ys), weights_of(x, real)
    if fisher is None:
        size = jnp.sum(jnp.square(y), axis=-1).reshape(-1)
        return Passed(Data(x, y, weight, weight / jnp.where(size > 0, size, 1.0)), shown)
    return Passed(Data(x, y, weight, fisher.reshape(-1)), shown)
