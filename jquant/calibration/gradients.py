"""How the loss depends on every matrix of a model, measured on samples of text, block by block.

The forward pass keeps what goes into each block; from the last block to the first, the gradient of the loss
is then carried back through one block at a time. One block's weights and a few samples are on the device; the
activations, samples · tokens · width · (blocks + 1) float32, lie in memory or in a file.

The loss is −log p(next token), summed over tokens. For a matrix y = W x, with δ the gradient of the loss with
respect to y, the use of W at one token has the gradient δ xᵀ. Its square, δ_i² x_j², needs no matrix a token:
Σ_t (δ_t²)(x_t²)ᵀ is one product. This *per-token* Fisher leaves out what the uses of W at two tokens share;
where each sample has one use, it is the Fisher diagonal itself.

Where the next token comes from makes two matrices of it. Drawn from the model's own prediction
(`sampled_labels`), the mean is the Fisher matrix, which is the Hessian of the KL divergence between the model
and a changed copy: what quantization is judged by. Taken from the text (`text_labels`), it is the empirical
Fisher, in which tokens that the model finds unlikely weigh most (Kunstner et al. 2019, Limitations of the
Empirical Fisher Approximation). The gradient itself is that of the text's loss only with the text's tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.calibration._calibrators import Stats, add, count_of
from jquant.calibration._collect import Progress, embed_into, padded, real_tokens, run_through
from jquant.calibration._statistics import add_rows, check_finite, finite, init_all, weights_of
from jquant.calibration.activations import IN_MEMORY, scratch
from jquant.core import Block, BlockwiseModel, UserError

LOGITS = 1 << 26  # values of a step through the output matrix: 256 MB, or one sample

# logits [s, t, vocab] and the tokens [s, t] they are of → the tokens [s, t] whose likelihood is the loss.
Labels = Callable[[Array, np.ndarray], Array]


class GradientCalibrator(NamedTuple):
    """init(out, in) → statistics of no tokens. update(statistics, x [n, in], δ [n, out], weight [n]) adds n
    tokens, but those of weight 0. merge(a, b) → statistics of the tokens of both."""

    init: Callable[[int, int], Stats]
    update: Callable[[Stats, Array, Array, Array], Stats]
    merge: Callable[[Stats, Stats], Stats]


def _sums(name: str, shape: Callable[[int, int], tuple[int, ...]], sums: str) -> GradientCalibrator:
    """Sums over tokens; sums: an einsum of x, δ and the weight."""

    def init(out: int, in_: int) -> Stats:
        return {name: jnp.zeros(shape(out, in_), jnp.float32), "count": jnp.zeros((), jnp.int32)}

    def update(
        stats: Stats, x: Float[Array, "n in"], g: Float[Array, "n out"], weight: Float[Array, " n"]
    ) -> Stats:
        # Padding has no gradient, but where it is not finite 0 times it is not 0.
        g = jnp.where(weight[:, None] > 0, g, 0.0)
        return add(stats, {name: _EINSUMS[sums](x, g), "count": count_of(weight)})

    return GradientCalibrator(init, update, add)


_product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
_EINSUMS: Mapping[str, Callable[[Array, Array], Array]] = {
    "δ xᵀ": lambda x, g: _product("no,ni->oi", g, x),
    "δ² x²ᵀ": lambda x, g: _product("no,ni->oi", g * g, x * x),
    "|δ|² x²": lambda x, g: _product("n,ni->i", jnp.sum(g * g, axis=1), x * x),
    "δ² |x|²": lambda x, g: _product("no,n->o", g * g, jnp.sum(x * x, axis=1)),
    "|δ|²": lambda x, g: jnp.sum(g * g),
    "δ δᵀ": lambda x, g: _product("no,np->op", g, g),
}

# Σ δ xᵀ, float32 [out, in]: the gradient of the summed loss. All have "count", the number of tokens.
GRADIENT = _sums("gradient", lambda out, in_: (out, in_), "δ xᵀ")
# Σ (δ²)(x²)ᵀ, [out, in]: the per-token Fisher diagonal; its sums over rows, [in], and over columns, [out].
FISHER = _sums("fisher", lambda out, in_: (out, in_), "δ² x²ᵀ")
FISHER_COLUMNS = _sums("fisher_columns", lambda out, in_: (in_,), "|δ|² x²")
FISHER_ROWS = _sums("fisher_rows", lambda out, in_: (out,), "δ² |x|²")
# Σ |δ|², next to nothing: a pass for what else it shows, which still finds gradients that are not finite.
SQUARES = _sums("squares", lambda out, in_: (), "|δ|²")
# Σ δ δᵀ, [out, out], symmetric: the output's side of a Kronecker-factored Hessian (YAQA, Tseng et al. 2025).
OUTPUT_PRODUCTS = _sums("ggt", lambda out, in_: (out, out), "δ δᵀ")


def together(*calibrators: GradientCalibrator) -> GradientCalibrator:
    """Several statistics from one backward pass. All must be sums, as those above are."""

    def init(out: int, in_: int) -> Stats:
        return {name: value for c in calibrators for name, value in c.init(out, in_).items()}

    def update(stats: Stats, x: Array, g: Array, weight: Array) -> Stats:
        found: Stats = {}
        for c in calibrators:
            own = {name: stats[name] for name in c.init(g.shape[1], x.shape[1])}
            found |= c.update(own, x, g, weight)
        return found

    return GradientCalibrator(init, update, add)


def text_labels(logits: Float[Array, "s t vocab"], tokens: Int[np.ndarray, "s t"]) -> Int[Array, "s t"]:
    """The token that follows in the text; after the last one the first, which is masked."""
    return jnp.asarray(np.roll(tokens, -1, axis=1), jnp.int32)


def sampled_labels(seed: int) -> Labels:
    """Tokens drawn from the model's own predictions.

    A sample's draw follows from the seed and its tokens: parts of a run draw what the whole run does.
    """

    def draw(logits: Float[Array, "s t vocab"], tokens: Int[np.ndarray, "s t"]) -> Int[Array, "s t"]:
        # Padding at the end of a sample is the same in each part of a run too.
        of_sample = [zlib.crc32(np.ascontiguousarray(sample, np.int64).tobytes()) for sample in tokens]
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.array(of_sample, jnp.uint32))
        return jax.vmap(jax.random.categorical)(keys, logits)

    return draw


@runtime_checkable
class Tape(Protocol):
    """Where the activations of all blocks lie, and what an interrupted run left there.

    With n blocks, array i of 0 … n is what goes into block i, array n what comes out of the last one.
    """

    def forwarded(self) -> int:
        """How many of the activations, from the first on, are complete."""
        ...

    def restore(self) -> Iterable[dict[str, Stats]]:
        """The statistics of the blocks that the backward pass has done, from the last one on."""
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

    def finish(self, block: int, stats: dict[str, Stats]) -> None:
        """The backward pass has done this block, and cotangents `block` are complete."""
        ...


class ScratchTape:
    """A Tape that remembers nothing: memory, or files of `folder` without names where all activations of a
    run are larger than `in_memory` bytes."""

    def __init__(self, blocks: int, folder: Path | None = None, in_memory: int = IN_MEMORY):
        self._folder, self._in_memory = folder, in_memory // (blocks + 1)
        self._arrays: dict[int, np.ndarray] = {}

    def forwarded(self) -> int:
        return 0

    def restore(self) -> list[dict[str, Stats]]:
        return []

    def activations(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        if i not in self._arrays:
            self._arrays[i] = scratch(shape, self._folder, self._in_memory)
        return self._arrays[i]

    def keep(self, i: int) -> None:
        pass

    cotangents = activations

    def finish(self, block: int, stats: dict[str, Stats]) -> None:
        self._arrays.pop(block + 1)


def collect_gradients(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    calibrator: GradientCalibrator,
    labels: Labels,
    *,
    lengths: Int[np.ndarray, " s"] | None = None,
    batch: int = 4,
    tape: Tape | None = None,
    progress: Progress = lambda done, count: None,
) -> dict[str, Stats]:
    """The statistics of every matrix of every block, by GGUF tensor name; those of stacks [experts, …].

    Arguments and errors are those of `stream_gradients`.
    """
    blocks = stream_gradients(
        model, tokens, calibrator, labels, lengths=lengths, batch=batch, tape=tape, progress=progress
    )
    return {name: stats for block in reversed(list(blocks)) for name, stats in block.items()}


def stream_gradients(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    calibrator: GradientCalibrator,
    labels: Labels,
    *,
    lengths: Int[np.ndarray, " s"] | None = None,
    batch: int = 4,
    tape: Tape | None = None,
    progress: Progress = lambda done, count: None,
) -> Iterator[dict[str, Stats]]:
    """From the last block to the first, the statistics of its matrices by GGUF tensor name, on the host.

    lengths: real tokens of each sample, the rest being padding at its end; default: all. batch: samples on
    the device at a time. tape: default, memory or temporary files. progress counts each block twice: on the
    way forward and on the way back.

    Raises UserError, with tensor and sample, where a gradient is no finite number.
    """
    samples, length = tokens.shape
    real, batch, n = real_tokens(tokens, lengths), min(batch, samples), len(model.blocks)
    shape = (samples, length, model.embed(tokens[:0]).shape[-1])
    tape = ScratchTape(n) if tape is None else tape
    done = 0
    for stats in tape.restore():
        yield stats
        done += 1
    if done == n:
        return
    if done == 0:
        _forward(model, tokens, batch, tape, shape, progress)
    behind = tape.cotangents(n - done, shape)
    if done == 0:
        _into_head(model, tokens, labels, real, batch, tape.activations(n, shape), behind)
    for i in range(n - 1 - done, -1, -1):
        before = None if i == 0 else tape.cotangents(i, shape)
        x = tape.activations(i, shape)
        stats = _back_through_block(model, i, calibrator, x, behind, before, real, batch)
        tape.finish(i, stats)
        progress(2 * n - i, 2 * n)
        yield stats
        behind = x if before is None else before


def _forward(
    model: BlockwiseModel,
    tokens: np.ndarray,
    batch: int,
    tape: Tape,
    shape: tuple[int, ...],
    progress: Progress,
) -> None:
    n, complete = len(model.blocks), tape.forwarded()
    if complete == 0:
        embed_into(tape.activations(0, shape), model, tokens)
        tape.keep(0)
    for i in range(max(complete - 1, 0), n):
        x, y = tape.activations(i, shape), tape.activations(i + 1, shape)
        params, angles = model.load_block(i), jnp.asarray(model.angles(i, shape[1]))
        run_through(model.blocks[i], params, angles, x, y, batch)
        tape.keep(i + 1)
        progress(i + 1, 2 * n)


def _into_head(
    model: BlockwiseModel,
    tokens: np.ndarray,
    labels: Labels,
    real: np.ndarray,
    batch: int,
    y: np.ndarray,
    g: np.ndarray,
) -> None:
    """The gradient of the loss with respect to y, what comes out of the last block, into g."""
    shape = y.shape
    vocab = model.logits(jnp.zeros((1, 1, shape[2]), jnp.float32)).shape[-1]
    step = max(min(batch, LOGITS // (shape[1] * vocab)), 1)
    for start in range(0, len(y), step):
        part = slice(start, start + step)
        logits, pull = jax.vjp(model.logits, jnp.asarray(y[part]))
        counted = np.arange(shape[1])[None] < real[part, None] - 1  # the last token has no next one
        grads = _loss_gradient(logits, labels(logits, tokens[part]), jnp.asarray(counted))
        (found,) = pull(grads)
        finite = np.isfinite(np.asarray(jnp.sum(found, axis=(1, 2))))
        if not finite.all():
            raise UserError(
                f"output_norm.weight: its gradient is not finite in sample {start + int(finite.argmin())} "
                "(from 0); the model is damaged, or float32 is too small for it."
            )
        g[part] = found


@jax.jit
def _loss_gradient(
    logits: Float[Array, "s t vocab"], labels: Int[Array, "s t"], counted: Array
) -> Float[Array, "s t vocab"]:
    """∂(−log softmax(z)_y)/∂z = softmax(z) − e_y where the token counts, else 0."""
    p = jax.nn.softmax(logits, axis=-1)
    is_label = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None] == labels[..., None]
    return jnp.where(counted[..., None], p - is_label.astype(jnp.float32), 0.0)


def _back_through_block(
    model: BlockwiseModel,
    i: int,
    calibrator: GradientCalibrator,
    x: np.ndarray,
    behind: np.ndarray,
    before: np.ndarray | None,
    lengths: np.ndarray,
    batch: int,
) -> dict[str, Stats]:
    """Gradients `behind` block i, all samples, into `before` it where wanted; the block's statistics."""
    block, host = model.blocks[i], jax.local_devices(backend="cpu")[0]
    params, angles = model.load_block(i), jnp.asarray(model.angles(i, x.shape[1]))
    stats = empty = init_all(block, lambda shape: calibrator.init(shape[-2], shape[-1]))
    step = partial(_step, block, calibrator, params)
    for start in range(0, len(x), batch):
        part = slice(start, min(start + batch, len(x)))
        given, g, real = (padded(a[part], batch) for a in (x, behind, lengths))
        out, stats = step(stats, given, g, angles, real)

        def alone(k: int, given: Array = given, g: Array = g, real: Array = real) -> dict[str, Stats]:
            one = slice(k, k + 1)
            return step(empty, given[one], g[one], angles, real[one])[1]

        check_finite(finite(stats), alone, "gradient", i, range(start, part.stop))
        if before is not None:
            before[part] = out[: part.stop - start]
    return {f"blk.{i}.{name}.weight": jax.device_put(s, host) for name, s in stats.items()}


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    block: Block,
    calibrator: GradientCalibrator,
    params: Mapping[str, Mapping[str, Array]],
    stats: dict[str, Stats],
    x: Float[Array, "s t width"],
    g: Float[Array, "s t width"],
    angles: Float[Array, "t pairs"],
    real: Int[Array, " s"],
) -> tuple[Float[Array, "s t width"], dict[str, Stats]]:
    """The gradient before the block, and the statistics with these samples added."""

    def run(x: Array, nudges: Mapping) -> tuple[Array, Mapping]:
        y, shown = block.apply({"params": params, "nudges": nudges}, x, angles, mutable="inputs")
        return y, shown["inputs"]

    shown = jax.eval_shape(run, x, {})[1]
    nudges = {
        name: {"y": jnp.zeros((*inputs["x"].shape[:-1], params[name]["weight"].shape[-2]), jnp.float32)}
        for name, inputs in shown.items()
    }
    _, pull, inputs = jax.vjp(run, x, nudges, has_aux=True)
    before, of_outputs = pull(g)
    weight = weights_of(x, real)
    updated = {
        name: add_rows(
            calibrator.update, old, inputs[name], (inputs[name]["x"], of_outputs[name]["y"]), weight
        )
        for name, old in stats.items()
    }
    return before, updated
