"""What the inputs of every matrix of a model are like, measured on samples of text, block by block.

The activations of all samples go through block after block and are kept on the host; one block's weights and
a few samples are on the device at a time. A model of any depth needs the memory of one block.

A Calibrator is three pure functions. Its statistics are sums or maxima, so batches, runs and hosts merge in
any order, and a stack of experts has one set for each, of the tokens that the router sent there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.core import Block, BlockwiseModel, OutputError, UserError
from jquant.space import reserve
from jquant.text import human_size

Stats = dict[str, Array]
IN_MEMORY = 8 << 30  # bytes of activations; more of them go to a file

# Block and number of blocks that are done.
Progress = Callable[[int, int], None]


class Calibrator(NamedTuple):
    """init(width) → statistics of no tokens. update(statistics, x [n, width], weight [n]) adds n tokens, but
    those of weight 0. merge(a, b) → statistics of the tokens of both."""

    init: Callable[[int], Stats]
    update: Callable[[Stats, Array, Array], Stats]
    merge: Callable[[Stats, Stats], Stats]


def _sum(a: Stats, b: Stats) -> Stats:
    return {name: a[name] + b[name] for name in a}


def _largest(a: Stats, b: Stats) -> Stats:
    return {name: a[name] + b[name] if name == "count" else jnp.maximum(a[name], b[name]) for name in a}


def _count(weight: Float[Array, " n"]) -> Int[Array, ""]:
    return jnp.sum(weight > 0, dtype=jnp.int32)


def _init_vector(name: str) -> Callable[[int], Stats]:
    return lambda width: {name: jnp.zeros(width, jnp.float32), "count": jnp.zeros((), jnp.int32)}


def _add_squares(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    return _sum(stats, {"sum2": jnp.einsum("ni,ni,n->i", x, x, weight), "count": _count(weight)})


def _add(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    return _sum(stats, {"sum": jnp.einsum("ni,n->i", x, weight), "count": _count(weight)})


def _raise(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    absmax = jnp.max(jnp.abs(x) * weight[:, None], axis=0)
    return _largest(stats, {"absmax": absmax, "count": _count(weight)})


def _add_products(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    xtx = jnp.einsum("ni,nj->ij", x * weight[:, None], x, precision=lax.Precision.HIGHEST)
    return _sum(stats, {"xtx": xtx, "count": _count(weight)})


# Σ x²: the imatrix. Σ x. max |x|. All float32 [width], beside "count", the number of tokens.
SECOND_MOMENTS = Calibrator(_init_vector("sum2"), _add_squares, _sum)
MEANS = Calibrator(_init_vector("sum"), _add, _sum)
ABSOLUTE_MAXIMA = Calibrator(_init_vector("absmax"), _raise, _largest)
# Σ xᵀx, float32 [width, width], symmetric: the Hessian of the layer's squared error. Costs width/out of the
# layer itself: 2 · tokens · width² operations.
HESSIAN = Calibrator(
    lambda width: {"xtx": jnp.zeros((width, width), jnp.float32), "count": jnp.zeros((), jnp.int32)},
    _add_products,
    _sum,
)


@runtime_checkable
class Store(Protocol):
    """Where activations lie between blocks, and what an interrupted run left there."""

    def restore(self) -> list[dict[str, Stats]]:
        """The statistics of the blocks that are done, in order; the activations behind them are there too."""
        ...

    def activations(self, block: int, shape: tuple[int, ...]) -> np.ndarray:
        """float32: what goes into this block. May be the array of the block before, to be overwritten."""
        ...

    def finish(self, block: int, stats: dict[str, Stats]) -> None:
        """This block is done, and the activations behind it are complete."""
        ...


class Scratch:
    """A Store that remembers nothing: one array, in memory, or in a file of `folder` where it is larger than
    `in_memory` bytes. The file is gone when the array is."""

    def __init__(self, folder: Path | None = None, in_memory: int = IN_MEMORY):
        self._folder, self._in_memory = folder, in_memory
        self._array: np.ndarray | None = None

    def restore(self) -> list[dict[str, Stats]]:
        return []

    def activations(self, block: int, shape: tuple[int, ...]) -> np.ndarray:
        size = 4 * int(np.prod(shape, dtype=np.int64))
        if self._array is None and size <= self._in_memory:
            self._array = np.empty(shape, np.float32)
        elif self._array is None:
            folder = self._folder or Path(tempfile.gettempdir())
            try:
                with tempfile.TemporaryFile(dir=folder, prefix="jquant-") as file:
                    reserve(cast(BinaryIO, file), size)
                    mapped = np.memmap(file, np.float32, "r+", shape=shape)
            except OSError as error:
                raise OutputError(
                    f"{folder}: cannot take {human_size(size)} of activations: {error.strerror}; free some "
                    "space, set TMPDIR to a folder of another disk, or use fewer samples."
                ) from error
            self._array = cast(np.ndarray, mapped)
        return self._array

    def finish(self, block: int, stats: dict[str, Stats]) -> None:
        pass


def collect(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    calibrator: Calibrator,
    *,
    lengths: Int[np.ndarray, " s"] | None = None,
    batch: int = 4,
    store: Store | None = None,
    progress: Progress = lambda done, count: None,
) -> dict[str, Stats]:
    """The statistics of every matrix of every block, by GGUF tensor name; those of stacks [experts, …].

    They lie in the host's memory, whatever device they were made on.

    lengths: real tokens of each sample, the rest being padding at its end; default: all. batch: samples on
    the device at a time. store: default, memory or a temporary file; one that remembers continues a run.

    Raises UserError, with tensor and sample, where an input is no finite number.
    """
    samples, length = tokens.shape
    real = np.asarray(np.full(samples, length) if lengths is None else lengths, np.int32)
    shape = (samples, length, model.embed(tokens[:0]).shape[-1])
    store = Scratch() if store is None else store
    found = store.restore()
    count, done = len(model.blocks), len(found)
    if done < count:
        x = store.activations(done, shape)
        if done == 0:
            for start in range(0, samples, _EMBEDDED):
                x[start : start + _EMBEDDED] = model.embed(tokens[start : start + _EMBEDDED])
        for i in range(done, count):
            y = None if i == count - 1 else store.activations(i + 1, shape)
            found.append(_through_block(model, i, calibrator, x, y, real, min(batch, samples)))
            store.finish(i, found[-1])
            x = x if y is None else y
            progress(i + 1, count)
    return {name: stats for block in found for name, stats in block.items()}


def _through_block(
    model: BlockwiseModel,
    i: int,
    calibrator: Calibrator,
    x: np.ndarray,
    y: np.ndarray | None,
    lengths: np.ndarray,
    batch: int,
) -> dict[str, Stats]:
    """All samples x [s, t, width] through block i, into y where wanted; its statistics, on the host."""
    block, host = model.blocks[i], jax.devices("cpu")[0]
    params, angles = model.load_block(i), jnp.asarray(model.angles(i, x.shape[1]))
    stats = _init(block, calibrator)
    for start in range(0, len(x), batch):
        part = slice(start, min(start + batch, len(x)))
        given, real = _padded(x[part], batch), _padded(lengths[part], batch)
        out, stats = _step(block, calibrator, params, stats, given, angles, real)
        _check_finite(stats, partial(_step, block, calibrator, params), given, angles, real, i, start)
        if y is not None:
            y[part] = out[: part.stop - start]
    return {f"blk.{i}.{name}.weight": jax.device_put(s, host) for name, s in stats.items()}


def _padded(part: np.ndarray, batch: int) -> Array:
    """The last batch too has `batch` samples, the missing ones of length 0: one shape, one compilation."""
    return jnp.asarray(np.pad(part, [(0, batch - len(part))] + [(0, 0)] * (part.ndim - 1)))


_EMBEDDED = 256  # samples whose embedding is read at a time: one pass over the matrix for each


def _init(block: Block, calibrator: Calibrator) -> dict[str, Stats]:
    """Statistics of no tokens for every matrix of the block; a stack of experts has one for each."""
    found = {}
    for parameter, shape in block.shapes:
        name, _, kind = parameter.partition(".")
        if kind == "weight" and "norm" not in name:
            one = calibrator.init(shape[-1])
            if len(shape) > 2:
                one = jax.tree.map(lambda a, n=shape[0]: jnp.broadcast_to(a, (n, *a.shape)), one)
            found[name] = one
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    block: Block,
    calibrator: Calibrator,
    params: Mapping,
    stats: dict[str, Stats],
    x: Float[Array, "s t width"],
    angles: Float[Array, "t pairs"],
    real: Int[Array, " s"],
) -> tuple[Float[Array, "s t width"], dict[str, Stats]]:
    """The block's output, and the statistics with its inputs added."""
    y, shown = block.apply({"params": params}, x, angles, mutable="inputs")
    weight = (jnp.arange(x.shape[1])[None] < real[:, None]).astype(jnp.float32).reshape(-1)
    updated = {}
    for name, inputs in shown["inputs"].items():
        if "expert" in inputs:
            token = inputs["token"]
            of_row = jnp.where(token >= 0, weight[jnp.maximum(token, 0)], 0.0)
            rows = (inputs["x"], inputs["expert"], of_row)
            updated[name] = lax.scan(partial(_add_tile, calibrator), stats[name], rows)[0]
        else:
            updated[name] = calibrator.update(stats[name], inputs["x"].reshape(weight.size, -1), weight)
    return y, updated


def _add_tile(calibrator: Calibrator, stats: Stats, tile: tuple[Array, Array, Array]) -> tuple[Stats, None]:
    x, expert, weight = tile
    one = calibrator.update({name: value[expert] for name, value in stats.items()}, x, weight)
    return {name: value.at[expert].set(one[name]) for name, value in stats.items()}, None


def _check_finite(
    stats: dict[str, Stats], step: Callable, x: Array, angles: Array, real: Array, block: int, first: int
) -> None:
    """Raise for the first sample of this batch that makes a statistic infinite or not a number."""
    if not _not_finite(stats):
        return
    for k in range(x.shape[0]):
        empty = jax.tree.map(jnp.zeros_like, stats)
        names = _not_finite(step(empty, x[k : k + 1], angles, real[k : k + 1])[1])
        if names:
            raise UserError(
                f"blk.{block}.{names[0]}.weight: its input is not finite in sample {first + k} (from 0); the "
                "model is damaged, or float32 is too small for it. Leave that sample out to see which."
            )
    names = _not_finite(stats)
    raise UserError(
        f"blk.{block}.{names[0]}.weight: the sum over samples up to {first + x.shape[0] - 1} is too large "
        "for float32; calibrate on less text."
    )


def _not_finite(stats: dict[str, Stats]) -> list[str]:
    return [name for name, s in stats.items() if not all(bool(jnp.isfinite(a).all()) for a in s.values())]


def merge(calibrator: Calibrator, a: Mapping[str, Stats], b: Mapping[str, Stats]) -> dict[str, Stats]:
    """The statistics of two runs of one model as if they had been one run.

    Raises ValueError where the runs are of different models.
    """
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"statistics of different models: {odd[0]} and {len(odd) - 1} more are in one only.")
    return {name: calibrator.merge(a[name], b[name]) for name in a}
