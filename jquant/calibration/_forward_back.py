"""Forward through all blocks, and the gradient of a loss back through them, one block in memory.

The forward pass keeps what goes into each block; from the last block to the first, the gradient of the loss
is then carried back through one block at a time. The activations, samples · tokens · width · (blocks + 1)
float32, lie in memory or in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jquant.calibration._walk import Progress, Turn, batches, embed_into, shape_of, turn, walk
from jquant.calibration.activations import IN_MEMORY, scratch
from jquant.core import Block, BlockwiseModel
from jquant.models import matrices, run_block

_T = TypeVar("_T")

# (y [s, t, width], g): the gradient of the loss with respect to y, what the last block puts out, goes into g,
# which may be y: sample by sample it is written after those are read.
IntoHead = Callable[[np.ndarray, np.ndarray], None]
# (block, x, behind, before): the gradient behind a block, whose input was x, goes through it into `before`,
# where that is wanted, and what is made of it on the way comes out. x and `before` may be one array.
Back = Callable[[Turn, np.ndarray, np.ndarray, np.ndarray | None], _T]


@runtime_checkable
class Tape(Protocol[_T]):
    """Where the activations of all blocks lie, and what an interrupted run left there.

    With n blocks, array i of 0 … n is what goes into block i, array n what comes out of the last one.
    """

    def forwarded(self) -> int:
        """How many of the activations, from the first on, are complete."""
        ...

    def restore(self) -> Iterable[_T]:
        """What was made of the blocks that the backward pass has done, from the last one on."""
        ...

    def activations(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        """float32: to be filled, or complete."""
        ...

    def keep(self, i: int) -> None:
        """Activations i are complete."""
        ...

    def cotangents(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        """float32: the gradient with respect to activations i, whose array it may be: sample by sample it is
        written after those are read."""
        ...

    def finish(self, block: int, result: _T, /) -> None:
        """The backward pass has made this of the block, and cotangents `block` are complete."""
        ...


class ScratchTape:
    """A Tape that remembers nothing: memory, or files of `folder` without names where all activations of a
    run are larger than `in_memory` bytes."""

    def __init__(self, blocks: int, folder: Path | None = None, in_memory: int = IN_MEMORY):
        self._folder, self._in_memory = folder, in_memory // (blocks + 1)
        self._arrays: dict[int, np.ndarray] = {}

    def forwarded(self) -> int:
        return 0

    def restore(self) -> list[Any]:
        return []

    def activations(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        if i not in self._arrays:
            self._arrays[i] = scratch(shape, self._folder, self._in_memory)
        return self._arrays[i]

    def keep(self, i: int) -> None:
        pass

    cotangents = activations

    def finish(self, block: int, result: object) -> None:
        self._arrays.pop(block + 1)


def forward_back(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    into_head: IntoHead,
    back: Back[_T],
    *,
    batch: int = 1,
    tape: Tape[_T] | None = None,
    embeddings: np.ndarray | None = None,
    progress: Progress = lambda done, count: None,
) -> Iterator[_T]:
    """What `back` makes of each block, from the last to the first.

    batch: samples through a block at once on the way forward. tape: default, memory or temporary files; one
    that remembers continues a run. embeddings: an array [s, t, width] for the gradient with respect to them,
    where it is wanted. progress counts each block twice: on the way forward and on the way back.
    """
    n, shape = len(model.blocks), shape_of(model, tokens)
    tape = ScratchTape(n) if tape is None else tape
    done = 0
    for result in tape.restore():
        yield result
        done += 1
    if done == n:
        return
    if done == 0:
        _forward(model, tokens, batch, tape, shape, progress)
    behind = tape.cotangents(n - done, shape)
    if done == 0:
        into_head(tape.activations(n, shape), behind)
    for i in range(n - 1 - done, -1, -1):
        before = tape.cotangents(i, shape) if i > 0 else embeddings
        x = tape.activations(i, shape)
        result = back(turn(model, i, shape[1]), x, behind, before)
        tape.finish(i, result)
        progress(2 * n - i, 2 * n)
        yield result
        behind = x if before is None else before


def _forward(
    model: BlockwiseModel,
    tokens: np.ndarray,
    batch: int,
    tape: Tape[_T],
    shape: tuple[int, ...],
    progress: Progress,
) -> None:
    n, complete = len(model.blocks), tape.forwarded()
    if complete == 0:
        embed_into(tape.activations(0, shape), model, tokens)
        tape.keep(0)
    for at in walk(model, shape[1], range(max(complete - 1, 0), n)):
        at.through(tape.activations(at.i, shape), tape.activations(at.i + 1, shape), batch)
        tape.keep(at.i + 1)
        progress(at.i + 1, 2 * n)


def matrix_gradients(
    at: Turn, x: np.ndarray, behind: np.ndarray, before: np.ndarray | None
) -> Iterator[dict[str, Array]]:
    """Of sample after sample, the gradient of the loss with respect to each matrix of a block: a `Back`."""
    for part in batches(len(x), 1):
        arguments = jnp.asarray(x[part]), at.angles, jnp.asarray(behind[part])
        of_matrices, of_x = _gradients(at.block, at.params, *arguments)
        if before is not None:
            before[part] = of_x
        yield of_matrices


@partial(jax.jit, static_argnums=0)
def _gradients(
    block: Block, params: Mapping, x: Array, angles: Array, g: Array
) -> tuple[dict[str, Array], Array]:
    """Those with respect to a block's matrices, and to its input."""
    _, pull = jax.vjp(lambda params, x: run_block(block, params, x, angles), params, x)
    of_params, of_x = pull(g)
    return matrices(of_params), of_x
