"""A walk through the blocks of a model, one of them in memory, and the samples that go with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.calibration.activations import Activations
from jquant.core import Block, BlockwiseModel
from jquant.models import run_block

# Blocks that are done, and how many there are.
Progress = Callable[[int, int], None]

# Samples, and their bytes, whose embedding is read at a time: one pass over the matrix for each.
_EMBEDDED, _EMBEDDED_BYTES = 256, 1 << 30


class Turn(NamedTuple):
    """A block whose turn it is."""

    i: int
    block: Block
    params: dict[str, dict[str, Array]]
    angles: Float[Array, "t pairs"]

    def run(self, x: Float[Array, "s t width"]) -> Float[Array, "s t width"]:
        """The block's output."""
        return run_block(self.block, self.params, x, self.angles)

    def through(self, x: Activations, y: Activations, batch: int) -> None:
        """All samples x [s, t, width] through the block, into y, which may be x."""
        for part in batches(len(x), batch):
            out = run_block(self.block, self.params, padded(x[part], batch), self.angles)
            y[part] = out[: part.stop - part.start]

    def outputs(
        self, x: Float[np.ndarray, "s t width"], params: dict[str, dict[str, Array]] | None = None
    ) -> Float[np.ndarray, "s t width"]:
        """The block's output, sample by sample. params: in place of its own."""
        at, y = self if params is None else self._replace(params=params), np.empty_like(x)
        at.through(x, y, batch=1)
        return y


def turn(model: BlockwiseModel, i: int, tokens: int) -> Turn:
    """Block i, loaded, for samples of so many tokens."""
    return Turn(i, model.blocks[i], model.load_block(i), jnp.asarray(model.angles(i, tokens)))


def walk(model: BlockwiseModel, tokens: int, order: Iterable[int] | None = None) -> Iterator[Turn]:
    """(i, block, params, angles) of block after block, each loaded when it is its turn.

    tokens: of a sample. order: of the blocks; default: from the first to the last.
    """
    for i in range(len(model.blocks)) if order is None else order:
        yield turn(model, i, tokens)


def run_through(
    model: BlockwiseModel,
    x: Activations,
    *,
    batch: int = 1,
    progress: Progress = lambda done, count: None,
) -> None:
    """All samples x [s, t, width], in place, from the embedding to the output of the last block."""
    for at in walk(model, x.shape[1]):
        at.through(x, x, batch)
        progress(at.i + 1, len(model.blocks))


def batches(samples: int, batch: int) -> Iterator[slice]:
    """All samples, so many at a time; the last batch may have fewer."""
    for start in range(0, samples, batch):
        yield slice(start, min(start + batch, samples))


def padded(part: np.ndarray | Array, batch: int) -> Array:
    """The last batch too has `batch` samples, the missing ones of length 0: one shape, one compilation."""
    return jnp.asarray(pad(part, batch))


def pad(part: np.ndarray | Array, batch: int) -> np.ndarray | Array:
    """`padded`, where the samples lie."""
    if len(part) == batch:
        return part
    np_or_jnp = jnp if isinstance(part, Array) else np
    return np_or_jnp.pad(part, [(0, batch - len(part))] + [(0, 0)] * (part.ndim - 1))


def real_tokens(
    tokens: Int[np.ndarray, "s t"], lengths: Int[np.ndarray, " s"] | None
) -> Int[np.ndarray, " s"]:
    """Of each sample, all where no lengths are known."""
    return np.asarray(np.full(len(tokens), tokens.shape[1]) if lengths is None else lengths, np.int32)


def shape_of(model: BlockwiseModel, tokens: Int[np.ndarray, "s t"]) -> tuple[int, int, int]:
    """(s, t, width) of the activations of these samples."""
    return (*tokens.shape, model.embed(tokens[:0]).shape[-1])


def embed_into(x: Activations, model: BlockwiseModel, tokens: Int[np.ndarray, "s t"], batch: int = 1) -> None:
    """What goes into the first block. batch: whole batches are written at once."""
    sample = tokens.shape[1] * x.shape[-1] * 4
    step = max(min(_EMBEDDED, _EMBEDDED_BYTES // sample) // batch, 1) * batch
    for start in range(0, len(tokens), step):
        x[start : start + step] = model.embed(tokens[start : start + step])
