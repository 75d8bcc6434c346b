"""What the inputs of every matrix of a model are like, measured on samples of text, block by block.

The activations of all samples go through block after block and are kept on the host; one block's weights and
a few samples are on the device at a time. A model of any depth needs the memory of one block.

A Calibrator is three pure functions. Its statistics are sums or maxima, so batches, runs and hosts merge in
any order, and a stack of experts has one set for each, of the tokens that the router sent there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.ahead import Ahead
from jquant.between import Activations, Store, store_for
from jquant.core import Block, BlockwiseModel, UserError, block_parameters

Stats = dict[str, Array]

# Block and number of blocks that are done.
Progress = Callable[[int, int], None]


class Calibrator(NamedTuple):
    """init(width) → statistics of no tokens. update(statistics, x [n, width], weight [n]) adds n tokens, but
    those of weight 0. merge(a, b) → statistics of the tokens of both. squares: those that are [width, width],
    whose rows several devices may share."""

    init: Callable[[int], Stats]
    update: Callable[[Stats, Array, Array], Stats]
    merge: Callable[[Stats, Stats], Stats]
    squares: frozenset[str] = frozenset()


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
    x = x.astype(jnp.float32)
    return add(stats, {"sum2": jnp.einsum("ni,ni,n->i", x, x, weight), "count": count_of(weight)})


def _add(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    x = x.astype(jnp.float32)
    return add(stats, {"sum": jnp.einsum("ni,n->i", x, weight), "count": count_of(weight)})


def _raise(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    absmax = jnp.max(jnp.abs(x.astype(jnp.float32)) * weight[:, None], axis=0)
    return add_or_raise(stats, {"absmax": absmax, "count": count_of(weight)})


def _add_products(stats: Stats, x: Float[Array, "n width"], weight: Float[Array, " n"]) -> Stats:
    xtx = jnp.einsum(
        "ni,nj->ij",
        x * weight.astype(x.dtype)[:, None],
        x,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
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
    squares=frozenset({"xtx"}),
)


# (model, block, calibrator, x, y, lengths, batch) → statistics: see `through_block`.
Through = Callable[
    [BlockwiseModel, int, Calibrator, Activations, Activations | None, np.ndarray, int], dict[str, Stats]
]


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
    the device at a time. store: default, the device, memory or a temporary file; one that remembers
    continues a run. through: how the samples go through a block; default, on one device.

    Raises UserError, with tensor and sample, where an input is no finite number.
    """
    samples, length = tokens.shape
    real, batch = real_tokens(tokens, lengths), min(batch, samples)
    shape = (samples, length, model.embed(tokens[:0]).shape[-1])
    store = store_for(shape, batch) if store is None else store
    count, done = len(model.blocks), 0
    for stats in store.restore():
        yield stats
        done += 1
    if done == count:
        return
    x = store.activations(done, shape)
    if done == 0:
        embed_into(x, model, tokens, batch)
    with contextlib.ExitStack() as stack:
        if jax.default_backend() != "cpu":  # there, reading would take time from computing
            model = stack.enter_context(Ahead(model))
        for i in range(done, count):
            y = None if i == count - 1 else store.activations(i + 1, shape)
            stats = (through or through_block)(model, i, calibrator, x, y, real, batch)
            store.finish(i, stats)
            progress(i + 1, count)
            yield stats
            x = x if y is None else y


def real_tokens(
    tokens: Int[np.ndarray, "s t"], lengths: Int[np.ndarray, " s"] | None
) -> Int[np.ndarray, " s"]:
    return np.asarray(np.full(len(tokens), tokens.shape[1]) if lengths is None else lengths, np.int32)


def embed_into(x: Activations, model: BlockwiseModel, tokens: Int[np.ndarray, "s t"], batch: int = 1) -> None:
    """batch: whole batches are written at once."""
    sample = tokens.shape[1] * x.shape[-1] * 4
    step = max(min(_EMBEDDED, _EMBEDDED_BYTES // sample) // batch, 1) * batch
    for start in range(0, len(tokens), step):
        x[start : start + step] = model.embed(tokens[start : start + step])


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
    x: Activations,
    y: Activations | None,
    lengths: np.ndarray,
    batch: int,
) -> dict[str, Stats]:
    """All samples x [s, t, width] through block i, into y where wanted; its statistics, on the host.

    Of each distinct input, by the first name that `shared_inputs` has for it; lengths: real tokens [s].
    """
    block, host = model.blocks[i], jax.devices("cpu")[0]
    params, angles = model.load_block(i), jnp.asarray(model.angles(i, x.shape[1]))
    distinct = {within_block(first) for first in shared_inputs(model, i).values()}

    def nothing() -> dict[str, Stats]:
        made = init_all(block, lambda shape: calibrator.init(shape[-1]))
        return {name: jax.tree.map(jnp.copy, made[name]) for name in made if name in distinct}

    stats, check = nothing(), lambda: None
    for start in range(0, len(x), batch):
        part = slice(start, min(start + batch, len(x)))
        given, real = padded(x[part], batch), padded(lengths[part], batch)
        out, stats = _step(block, calibrator, params, stats, given, angles, real)

        def alone(k: int, given: Array = given, real: Array = real) -> dict[str, Stats]:
            return _step(block, calibrator, params, nothing(), given[k : k + 1], angles, real[k : k + 1])[1]

        # The flags of a batch are looked at when the next one is under way: the device need not wait.
        check()
        check = partial(check_finite, finite(stats), alone, "input", i, range(start, part.stop))
        if y is not None:
            y[part] = out[: part.stop - start]
    check()
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


def padded(part: np.ndarray | Array, batch: int) -> Array:
    """The last batch too has `batch` samples, the missing ones of length 0: one shape, one compilation."""
    if len(part) == batch:
        return jnp.asarray(part)
    np_or_jnp = jnp if isinstance(part, Array) else np
    return jnp.asarray(np_or_jnp.pad(part, [(0, batch - len(part))] + [(0, 0)] * (part.ndim - 1)))


# Samples, and their bytes, whose embedding is read at a time: one pass over the matrix for each.
_EMBEDDED, _EMBEDDED_BYTES = 256, 1 << 30


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


_step = jax.jit(add_inputs, static_argnums=(0, 1), donate_argnums=3)


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


@jax.jit
def finite(stats: dict[str, Stats]) -> dict[str, Array]:
    """Of each matrix whether all its statistics are finite."""

    def of(s: Stats) -> Array:
        return jnp.stack([jnp.isfinite(a).all() for a in s.values()]).all()

    return {name: of(s) for name, s in stats.items()}


def check_finite(
    flags: Mapping[str, Array],
    alone: Callable[[int], dict[str, Stats]],
    what: str,
    block: int,
    samples: range,
) -> None:
    """Raise for the first sample of a batch that makes a statistic infinite or not a number.

    flags: `finite` of the statistics with the batch. alone(k): the statistics of the batch's sample k and no
    other.
    """
    if not _not_finite(flags):
        return
    for k, sample in enumerate(samples):
        names = _not_finite(finite(alone(k)))
        if names:
            raise UserError(
                f"blk.{block}.{names[0]}.weight: its {what} is not finite in sample {sample} (from 0); the "
                "model is damaged, or float32 is too small for it. Leave that sample out to see which."
            )
    names = _not_finite(flags)
    raise UserError(
        f"blk.{block}.{names[0]}.weight: the sum over samples up to {samples[-1]} is too large for float32; "
        "calibrate on less text."
    )


def _not_finite(flags: Mapping[str, Array]) -> list[str]:
    return [name for name, flag in jax.device_get(dict(flags)).items() if not flag]


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
