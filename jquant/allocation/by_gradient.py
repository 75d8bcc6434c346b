"""Weights of tensors by the Fisher information of their matrices: ½ Σ F e² for errors e of a usual shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.allocation.noise import local_squares, relative_error
from jquant.calibration import Progress, Turn, forward_back, matrix_gradients
from jquant.models import Decoder

EMBEDDINGS = "token_embd.weight"


def gradient_weights(
    model: Decoder,
    tokens: Int[np.ndarray, "s t"],
    importance: Mapping[str, Float[np.ndarray, "matrices cols"]],
    *,
    seed: int = 0,
    progress: Progress = lambda done, count: None,
) -> dict[str, float]:
    """½ Σ F e² of each matrix for errors e whose relative error is 1, spread as a quantizer spreads them.

    e² is as in `local_squares`. F is the mean over samples of the square of the gradient for a
    whole sample, whose labels are drawn independently: the cross terms of tokens vanish in the mean. Float32.
    """
    weigh = partial(_weight, importance=importance, tokens=tokens.size)
    weights = dict[str, float]()

    def into_head(y: np.ndarray, g: np.ndarray) -> None:
        square = _through_output(model, y, g, jax.random.key(seed))
        weights[model.output_name] = weigh(model.output_name, square, model.tensors.tensor(model.output_name))

    into_embeddings = np.empty((*tokens.shape, model.width), np.float32)
    back = partial(_back_through_block, weigh)
    for of_block in forward_back(
        model, tokens, into_head, back, embeddings=into_embeddings, progress=progress
    ):
        weights |= of_block
    square = _of_lookups(model, tokens, into_embeddings)
    looked_up = weigh(EMBEDDINGS, square, model.tensors.tensor(EMBEDDINGS))
    weights[EMBEDDINGS] = weights.get(EMBEDDINGS, 0.0) + looked_up
    return weights


def _back_through_block(
    weigh: Callable[[str, np.ndarray, np.ndarray], float],
    at: Turn,
    x: np.ndarray,
    behind: np.ndarray,
    before: np.ndarray | None,
) -> dict[str, float]:
    """The weights of a block's matrices."""
    weights, squares = dict[str, float](), dict[str, Array]()
    for of_sample in matrix_gradients(at, x, behind, before):
        squares = {name: g**2 + squares.get(name, 0.0) for name, g in of_sample.items()}
    for name, square in squares.items():
        full = f"blk.{at.i}.{name}.weight"
        weights[full] = weigh(full, np.asarray(square), np.asarray(at.params[name]["weight"]))
    return weights


def _through_output(model: Decoder, x: np.ndarray, back: np.ndarray, key: Array) -> np.ndarray:
    """Squares of the gradients of the output matrix; those of its input go into `back`, [s, t, width]."""
    slabs = model.output_slabs()
    parts = [jnp.zeros((stop - start, model.width), jnp.float32) for start, stop in slabs]
    for k in range(len(x)):
        one = jnp.asarray(x[k : k + 1])
        logits, pull = jax.vjp(model.logits, one)
        labels = jax.random.categorical(jax.random.fold_in(key, k), logits)
        g = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        back[k] = pull(g)[0][0]
        for i, (start, stop) in enumerate(slabs):
            rows = jnp.asarray(model.output_rows(start, stop))
            of_rows = jax.vjp(lambda rows, x=one: model.project(rows, x), rows)[1](g[..., start:stop])[0]
            parts[i] = parts[i] + of_rows**2
    return np.concatenate([np.asarray(part) for part in parts])


def _of_lookups(model: Decoder, tokens: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Squares of the gradients of the token embeddings by the inputs that they make."""
    square = np.zeros(model.tensors.specs[EMBEDDINGS].shape, np.float32)
    for k in range(len(tokens)):
        of_rows = np.zeros_like(square)
        np.add.at(of_rows, tokens[k], back[k] * np.float32(model.embedding_scale))
        square += of_rows**2
    return square


def _weight(
    name: str, square: np.ndarray, x: np.ndarray, importance: Mapping[str, np.ndarray], tokens: int
) -> float:
    """½ Σ F e² / (Σ w e² / Σ w x²) a token with e² as in `local_squares`; any scale of e."""
    e2 = local_squares(x)
    damage = float((square * e2).sum(dtype=np.float64)) / 2
    error = relative_error(e2, x, importance.get(name))
    return (damage / error if error > 0 else 0.0) / tokens
