"""All samples through block after block, and what its calibrator finds in each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jquant.calibration._calibrators import Calibrator, Stats
from jquant.calibration._prefetch import Ahead
from jquant.calibration._statistics import add_inputs, check_finite, finite, init_all
from jquant.calibration._walk import Progress, batches, embed_into, padded, real_tokens, shape_of, turn
from jquant.calibration.activations import Activations, Store, store_for
from jquant.core import Block, BlockwiseModel, block_parameters

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

    >>> stats = jquant.calibration.collect(model.decoder(), samples.tokens, jquant.calibration.HESSIAN)
    >>> stats["blk.0.ffn_down.weight"]["xtx"].shape  # Σ x xᵀ of its inputs
    (96, 96)
    """
    statistics: dict[str, Stats] = {}
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
        statistics |= {name: block[first] for name, first in shared_inputs(model, i).items()}
    return statistics


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
    real, batch, shape = real_tokens(tokens, lengths), min(batch, len(tokens)), shape_of(model, tokens)
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


def shared_inputs(model: BlockwiseModel, i: int) -> dict[str, str]:
    """Each matrix of block i → the first in the order of their names that is given the very same input.

    Full GGUF tensor names; that first one maps to itself.
    """
    width, pairs = model.embed(np.zeros((0, 1), np.int64)).shape[-1], model.angles(i, 1).shape[-1]
    pairs_of_names = _shared(model.blocks[i], width, pairs)
    return {f"blk.{i}.{name}.weight": f"blk.{i}.{first}.weight" for name, first in pairs_of_names}


@cache
def _shared(block: Block, width: int, pairs: int) -> tuple[tuple[str, str], ...]:
    first_of: dict[str, str] = {}

    def trace(params: Mapping, x: Array, angles: Array) -> None:
        shown = block.apply({"params": params}, x, angles, mutable="inputs")[1]["inputs"]
        # While a block is traced, one value is one object, however many matrices it is given to.
        first: dict[int, str] = {}
        for name in sorted(shown):
            first_of[name] = first.setdefault(id(shown[name]["x"]), name)

    params = block_parameters(block.shapes, lambda _, shape: jax.ShapeDtypeStruct(shape, jnp.float32))
    x = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    jax.eval_shape(trace, params, x, jax.ShapeDtypeStruct((1, pairs), jnp.float32))
    return tuple(first_of.items())


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
    (_, block, params, angles), host = turn(model, i, x.shape[1]), jax.local_devices(backend="cpu")[0]
    distinct = {within_block(first) for first in shared_inputs(model, i).values()}

    def nothing() -> dict[str, Stats]:
        every = init_all(block, lambda shape: calibrator.init(shape[-1]))
        return {name: jax.tree.map(jnp.copy, every[name]) for name in every if name in distinct}

    stats, check = nothing(), lambda: None
    for part in batches(len(x), batch):
        inputs, real = padded(x[part], batch), padded(lengths[part], batch)
        out, stats = _step(block, calibrator, params, stats, inputs, angles, real)

        def alone(k: int, inputs: Array = inputs, real: Array = real) -> dict[str, Stats]:
            return _step(block, calibrator, params, nothing(), inputs[k : k + 1], angles, real[k : k + 1])[1]

        # The flags of a batch are looked at when the next one is under way: the device need not wait.
        check()
        check = partial(check_finite, finite(stats), alone, "input", i, range(part.start, part.stop))
        if y is not None:
            y[part] = out[: part.stop - part.start]
    check()
    return {f"blk.{i}.{name}.weight": jax.device_put(s, host) for name, s in stats.items()}


_step = jax.jit(add_inputs, static_argnums=(0, 1), donate_argnums=3)


def within_block(name: str) -> str:
    """What a block calls one of its matrices: attn_q for blk.3.attn_q.weight."""
    return name.split(".", 2)[2].removesuffix(".weight")
