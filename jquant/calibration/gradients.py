"""How the loss depends on every matrix of a model, measured on samples of text, block by block.

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
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.calibration._calibrators import Stats, add, count_of
from jquant.calibration._forward_back import Tape, forward_back
from jquant.calibration._statistics import add_rows, check_finite, finite, init_all, weights_of
from jquant.calibration._walk import Progress, Turn, batches, padded, real_tokens
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
        updated: Stats = {}
        for c in calibrators:
            of_one = {name: stats[name] for name in c.init(g.shape[1], x.shape[1])}
            updated |= c.update(of_one, x, g, weight)
        return updated

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


def collect_gradients(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    calibrator: GradientCalibrator,
    labels: Labels,
    *,
    lengths: Int[np.ndarray, " s"] | None = None,
    batch: int = 4,
    tape: Tape[dict[str, Stats]] | None = None,
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
    tape: Tape[dict[str, Stats]] | None = None,
    progress: Progress = lambda done, count: None,
) -> Iterator[dict[str, Stats]]:
    """From the last block to the first, the statistics of its matrices by GGUF tensor name, on the host.

    lengths: real tokens of each sample, the rest being padding at its end; default: all. batch: samples on
    the device at a time. tape: default, memory or temporary files. progress counts each block twice: on the
    way forward and on the way back.

    Raises UserError, with tensor and sample, where a gradient is no finite number.
    """
    real, batch = real_tokens(tokens, lengths), min(batch, len(tokens))
    into_head = partial(_into_head, model, tokens, labels, real, batch)
    back = partial(_back_through_block, calibrator, real, batch)
    return forward_back(model, tokens, into_head, back, batch=batch, tape=tape, progress=progress)


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
    for part in batches(len(y), step):
        logits, pull = jax.vjp(model.logits, jnp.asarray(y[part]))
        counted = np.arange(shape[1])[None] < real[part, None] - 1  # the last token has no next one
        grads = _loss_gradient(logits, labels(logits, tokens[part]), jnp.asarray(counted))
        (of_inputs,) = pull(grads)
        finite = np.isfinite(np.asarray(jnp.sum(of_inputs, axis=(1, 2))))
        if not finite.all():
            sample = part.start + int(finite.argmin())
            raise UserError(
                f"output_norm.weight: its gradient is not finite in sample {sample} (from 0); the "
                "model is damaged, or float32 is too small for it."
            )
        g[part] = of_inputs


@jax.jit
def _loss_gradient(
    logits: Float[Array, "s t vocab"], labels: Int[Array, "s t"], counted: Array
) -> Float[Array, "s t vocab"]:
    """∂(−log softmax(z)_y)/∂z = softmax(z) − e_y where the token counts, else 0."""
    p = jax.nn.softmax(logits, axis=-1)
    is_label = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None] == labels[..., None]
    return jnp.where(counted[..., None], p - is_label.astype(jnp.float32), 0.0)


def _back_through_block(
    calibrator: GradientCalibrator,
    lengths: np.ndarray,
    batch: int,
    at: Turn,
    x: np.ndarray,
    behind: np.ndarray,
    before: np.ndarray | None,
) -> dict[str, Stats]:
    """Gradients `behind` a block, all samples, into `before` it where wanted; the block's statistics."""
    (i, block, params, angles), host = at, jax.local_devices(backend="cpu")[0]
    stats = empty = init_all(block, lambda shape: calibrator.init(shape[-2], shape[-1]))
    step = partial(_step, block, calibrator, params)
    for part in batches(len(x), batch):
        inputs, g, real = (padded(a[part], batch) for a in (x, behind, lengths))
        out, stats = step(stats, inputs, g, angles, real)

        def alone(k: int, inputs: Array = inputs, g: Array = g, real: Array = real) -> dict[str, Stats]:
            one = slice(k, k + 1)
            return step(empty, inputs[one], g[one], angles, real[one])[1]

        check_finite(finite(stats), alone, "gradient", i, range(part.start, part.stop))
        if before is not None:
            before[part] = out[: part.stop - part.start]
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
