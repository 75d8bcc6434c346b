"""What the inputs of every matrix of a model are like, measured on samples of text, block by block.

The activations of all samples go through block after block and are kept on the host; one block's weights and
a few samples are on the device at a time. A model of any depth needs the memory of one block.

A Calibrator is three pure functions. Its statistics are sums or maxima, so batches, runs and hosts merge in
any order, and a stack of experts has one set for each, of the tokens that the router sent there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.core import Block, BlockwiseModel, OutputError, UserError, block_parameters
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


def add(a: Stats, b: Stats) -> Stats:
    """The merge of statistics that are all sums."""
    return {name: a[name] + b[name] for name in a}


def add_or_raise(a: Stats, b: Stats) -> Stats:
    """The merge of statistics that are sums, but "absmax" a maximum."""
    return {name: jnp.maximum(a[name], b[name]) if name == "absmax" else a[name] + b[name] for name in a}


def count_of(weight: Float[Array, " n"]) -> Int[Array, ""]:
    return jnp.sum(weight > 0, dtype=jnp.int32)


def _init_vector(name: str) -> Callable[[int], Stats]:
    return lambda width: {name: jnp.zeros(width, jnp.float32), "count": jnp.zeros((), jnp.int32)}


def _add_squares(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    return add(stats, {"sum2": jnp.einsum("ni,ni,n->i", x, x, weight), "count": count_of(weight)})


def _add(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    return add(stats, {"sum": jnp.einsum("ni,n->i", x, weight), "count": count_of(weight)})


def _raise(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    absmax = jnp.max(jnp.abs(x) * weight[:, None], axis=0)
    return add_or_raise(stats, {"absmax": absmax, "count": count_of(weight)})


def _add_products(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    xtx = jnp.einsum("ni,nj->ij", x * weight[:, None], x, precision=lax.Precision.HIGHEST)
    return add(stats, {"xtx": xtx, "count": count_of(weight)})


# Σ x²: the imatrix. Σ x. max |x|. All float32 [width], beside "count", the number of tokens.
SECOND_MOMENTS = Calibrator(_init_vector("sum2"), _add_squares, add)
MEANS = Calibrator(_init_vector("sum"), _add, add)
ABSOLUTE_MAXIMA = Calibrator(_init_vector("absmax"), _raise, add_or_raise)
# Σ xᵀx, float32 [width, width], symmetric: the Hessian of the layer's squared error. Costs width/out of the
# layer itself: 2 · tokens · width² operations.
HESSIAN = Calibrator(
    lambda width: {"xtx": jnp.zeros((width, width), jnp.float32), "count": jnp.zeros((), jnp.int32)},
    _add_products,
    add,
)


# (model, block, calibrator, x, y, lengths, batch) → statistics: see `through_block`.
Through = Callable[
    [BlockwiseModel, int, Calibrator, np.ndarray, np.ndarray | None, np.ndarray, int], dict[str, Stats]
]


@runtime_checkable
class Store(Protocol):
    """Where activations lie between blocks, and what an interrupted run left there."""

    def restore(self) -> Iterable[dict[str, Stats]]:
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
        if self._array is None:
            self._array = scratch(shape, self._folder, self._in_memory)
        return self._array

    def finish(self, block: int, stats: dict[str, Stats]) -> None:
        pass


def scratch(shape: tuple[int, ...], folder: Path | None, in_memory: int) -> np.ndarray:
    """float32, in memory, or in a file without a name where it is larger than `in_memory` bytes.

    Raises OutputError where the folder, default: the system's for temporary files, cannot take it.
    """
    size = 4 * int(np.prod(shape, dtype=np.int64))
    if size <= in_memory:
        return np.empty(shape, np.float32)
    folder = folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="jquant-") as file:
            reserve(cast(BinaryIO, file), size)
            return cast(np.ndarray, np.memmap(file, np.float32, "r+", shape=shape))
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot take {human_size(size)} of activations: {error.strerror}; free some "
            "space, set TMPDIR to a folder of another disk, or use fewer samples."
        ) from error


def collect(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    calibrator: Calibrator,
    *,
    lengths: Int[np.ndarray, " s"] | None = None,
    batch: int = 4,
    store: Store | None = None,
    through: Through | None = None,
    progress: Progress = lambda done, count: None,
) -> dict[str, Stats]:
    """The statistics of every matrix of every block, by GGUF tensor name; those of stacks [experts, …].

    Arguments and errors are those of `stream`.
    """
    found: dict[str, Stats] = {}
    blocks = stream(
        model,
        tokens,
        calibrator,
        lengths=lengths,
        batch=batch,
        store=store,
        through=through,
        progress=progress,
    )
    for i, block in enumerate(blocks):
        found |= {name: block[first] for name, first in shared_inputs(model, i).items()}
    return found


def stream(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    calibrator: Calibrator,
    *,
    lengths: Int[np.ndarray, " s"] | None = None,
    batch: int = 4,
    store: Store | None = None,
    through: Through | None = None,
    progress: Progress = lambda done, count: None,
) -> Iterator[dict[str, Stats]]:
    """Block after block, the statistics of each distinct input, by the first name that `shared_inputs` has
    for it. They lie in the host's memory, whatever device they were made on.

    lengths: real tokens of each sample, the rest being padding at its end; default: all. batch: samples on
    the device at a time. store: default, memory or a temporary file; one that remembers continues a run.
    through: how the samples go through a block; default, on one device.

    Raises UserError, with tensor and sample, where an input is no finite number.
    """
    samples, length = tokens.shape
    real = real_tokens(tokens, lengths)
    shape = (samples, length, model.embed(tokens[:0]).shape[-1])
    store = Scratch() if store is None else store
    count, done = len(model.blocks), 0
    for stats in store.restore():
        yield stats
        done += 1
    if done == count:
        return
    x = store.activations(done, shape)
    if done == 0:
        embed_into(x, model, tokens)
    for i in range(done, count):
        y = None if i == count - 1 else store.activations(i + 1, shape)
        stats = (through or through_block)(model, i, calibrator, x, y, real, min(batch, samples))
        store.finish(i, stats)
        progress(i + 1, count)
        yield stats
        x = x if y is None else y


def real_tokens(
    tokens: Int[np.ndarray, "s t"], lengths: Int[np.ndarray, " s"] | None
) -> Int[np.ndarray, " s"]:
    return np.asarray(np.full(len(tokens), tokens.shape[1]) if lengths is None else lengths, np.int32)


def embed_into(x: np.ndarray, model: BlockwiseModel, tokens: Int[np.ndarray, "s t"]) -> None:
    for start in range(0, len(tokens), _EMBEDDED):
        x[start : start + _EMBEDDED] = model.embed(tokens[start : start + _EMBEDDED])


def shared_inputs(model: BlockwiseModel, i: int) -> dict[str, str]:
    """Each matrix of block i → the first in the order of their names that is given the very same input.

    Full GGUF tensor names; that first one maps to itself.
    """
    width, pairs = model.embed(np.zeros((0, 1), np.int64)).shape[-1], model.angles(i, 1).shape[-1]
    found = _shared(model.blocks[i], width, pairs)
    return {f"blk.{i}.{name}.weight": f"blk.{i}.{first}.weight" for name, first in found}


@cache
def _shared(block: Block, width: int, pairs: int) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}

    def trace(params: Mapping, x: Array, angles: Array) -> None:
        shown = block.apply({"params": params}, x, angles, mutable="inputs")[1]["inputs"]
        # While a block is traced, one value is one object, however many matrices it is given to.
        first: dict[int, str] = {}
        for name in sorted(shown):
            found[name] = first.setdefault(id(shown[name]["x"]), name)

    params = block_parameters(block.shapes, lambda _, shape: jax.ShapeDtypeStruct(shape, jnp.float32))
    x = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    jax.eval_shape(trace, params, x, jax.ShapeDtypeStruct((1, pairs), jnp.float32))
    return tuple(found.items())


def through_block(
    model: BlockwiseModel,
    i: int,
    calibrator: Calibrator,
    x: np.ndarray,
    y: np.ndarray | None,
    lengths: np.ndarray,
    batch: int,
) -> dict[str, Stats]:
    """All samples x [s, t, width] through block i, into y where wanted; its statistics, on the host.

    Of each distinct input, by the first name that `shared_inputs` has for it; lengths: real tokens [s].
    """
    block, host = model.blocks[i], jax.devices("cpu")[0]
    params, angles = model.load_block(i), jnp.asarray(model.angles(i, x.shape[1]))
    distinct = {within_block(first) for first in shared_inputs(model, i).values()}
    made = init_all(block, lambda shape: calibrator.init(shape[-1]))
    stats = empty = {name: made[name] for name in made if name in distinct}
    for start in range(0, len(x), batch):
        part = slice(start, min(start + batch, len(x)))
        given, real = padded(x[part], batch), padded(lengths[part], batch)
        out, stats = _step(block, calibrator, params, stats, given, angles, real)

        def alone(k: int, given: Array = given, real: Array = real) -> dict[str, Stats]:
            return _step(block, calibrator, params, empty, given[k : k + 1], angles, real[k : k + 1])[1]

        check_finite(stats, alone, "input", i, range(start, part.stop))
        if y is not None:
            y[part] = out[: part.stop - start]
    return {f"blk.{i}.{name}.weight": jax.device_put(s, host) for name, s in stats.items()}


def run_through(
    block: Block, params: Mapping, angles: Array, x: np.ndarray, y: np.ndarray, batch: int
) -> None:
    """All samples x [s, t, width] through a block, into y, which may be x."""
    for start in range(0, len(x), batch):
        part = slice(start, min(start + batch, len(x)))
        y[part] = _output(block, params, padded(x[part], batch), angles)[: part.stop - start]


@partial(jax.jit, static_argnums=0)
def _output(block: Block, params: Mapping, x: Array, angles: Array) -> Array:
    return block.apply({"params": params}, x, angles, mutable="inputs")[0]


def within_block(name: str) -> str:
    """What a block calls one of its matrices: attn_q for blk.3.attn_q.weight."""
    return name.split(".", 2)[2].removesuffix(".weight")


def padded(part: np.ndarray, batch: int) -> Array:
    """The last batch too has `batch` samples, the missing ones of length 0: one shape, one compilation."""
    return jnp.asarray(np.pad(part, [(0, batch - len(part))] + [(0, 0)] * (part.ndim - 1)))


_EMBEDDED = 256  # samples whose embedding is read at a time: one pass over the matrix for each


def init_all(block: Block, init: Callable[[tuple[int, ...]], Stats]) -> dict[str, Stats]:
    """Statistics of no tokens for every matrix of the block, init(shape) each; a stack has one per expert."""
    found = {}
    for parameter, shape in block.shapes:
        name, _, kind = parameter.partition(".")
        if kind == "weight" and "norm" not in name:
            one = init(shape[-2:] if len(shape) > 1 else (1, *shape))
            if len(shape) > 2:
                one = jax.tree.map(lambda a, n=shape[0]: jnp.broadcast_to(a, (n, *a.shape)), one)
            found[name] = one
    return found


def add_inputs(
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
    weight = weights_of(x, real)
    updated = {
        name: add_rows(
            calibrator.update, before, shown["inputs"][name], (shown["inputs"][name]["x"],), weight
        )
        for name, before in stats.items()
    }
    return y, updated


_step = jax.jit(add_inputs, static_argnums=(0, 1))


def weights_of(x: Float[Array, "s t width"], real: Int[Array, " s"]) -> Float[Array, " n"]:
    """1 for each real token, 0 for padding."""
    return (jnp.arange(x.shape[1])[None] < real[:, None]).astype(jnp.float32).reshape(-1)


def add_rows(
    update: Callable[..., Stats],
    stats: Stats,
    inputs: Mapping[str, Array],
    rows: tuple[Array, ...],
    weight: Float[Array, " n"],
) -> Stats:
    """The statistics of one matrix after update(statistics, *rows, weight).

    inputs: what the block shows of it. rows: arrays with a row for each of inputs["x"]. In a stack each row
    goes to its expert's statistics.
    """
    if "expert" not in inputs:
        return update(stats, *(a.reshape(weight.size, -1) for a in rows), weight)
    token = inputs["token"]
    of_row = jnp.where(token >= 0, weight[jnp.maximum(token, 0)], 0.0)

    def add_tile(stats: Stats, tile: tuple[Array, Array, tuple[Array, ...]]) -> tuple[Stats, None]:
        expert, weight, rows = tile
        one = update({name: value[expert] for name, value in stats.items()}, *rows, weight)
        return {name: value.at[expert].set(one[name]) for name, value in stats.items()}, None

    return lax.scan(add_tile, stats, (inputs["expert"], of_row, rows))[0]


def check_finite(
    stats: dict[str, Stats], alone: Callable[[int], dict[str, Stats]], what: str, block: int, samples: range
) -> None:
    """Raise for the first sample of a batch that makes a statistic infinite or not a number.

    alone(k): the statistics of the batch's sample k and no other.
    """
    if not _not_finite(stats):
        return
    for k, sample in enumerate(samples):
        names = _not_finite(alone(k))
        if names:
            raise UserError(
                f"blk.{block}.{names[0]}.weight: its {what} is not finite in sample {sample} (from 0); the "
                "model is damaged, or float32 is too small for it. Leave that sample out to see which."
            )
    names = _not_finite(stats)
    raise UserError(
        f"blk.{block}.{names[0]}.weight: the sum over samples up to {samples[-1]} is too large for float32; "
        "calibrate on less text."
    )


def _not_finite(stats: dict[str, Stats]) -> list[str]:
    return [name for name, s in stats.items() if not all(bool(jnp.isfinite(a).all()) for a in s.values())]


@runtime_checkable
class Merges(Protocol):
    """A calibrator of inputs or of gradients."""

    @property
    def merge(self) -> Callable[[Stats, Stats], Stats]: ...


def merge(calibrator: Merges, a: Mapping[str, Stats], b: Mapping[str, Stats]) -> dict[str, Stats]:
    """The statistics of two runs of one model as if they had been one run.

    Raises ValueError where the runs are of different models.
    """
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"statistics of different models: {odd[0]} and {len(odd) - 1} more are in one only.")
    return {name: calibrator.merge(a[name], b[name]) for name in a}
