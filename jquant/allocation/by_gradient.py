"""Weights of tensors by the Fisher information of their matrices: ½ Σ F e² for errors e of a usual shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.allocation.errors import Progress
from jquant.allocation.noise import local_squares, relative_error
from jquant.calibration.activations import Scratch
from jquant.core import Block
from jquant.models import Decoder, matrices, run_block


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
    samples, length = tokens.shape
    count = len(model.blocks)
    scratch = Scratch().activations(0, (count + 1, samples, length, model.width))
    scratch[0] = model.embed(tokens)
    steps = 2 * count + 1
    for i in range(count):
        params, angles = model.load_block(i), jnp.asarray(model.angles(i, length))
        for k in range(samples):
            scratch[i + 1, k] = run_block(
                model.blocks[i], params, jnp.asarray(scratch[i, k : k + 1]), angles
            )[0]
        progress(i + 1, steps)
    found, back = _through_output(model, scratch[count], importance, jax.random.key(seed))
    progress(count + 1, steps)
    for i in range(count - 1, -1, -1):
        params, angles = model.load_block(i), jnp.asarray(model.angles(i, length))
        squares: dict[str, Array] = {}
        for k in range(samples):
            given = jnp.asarray(scratch[i, k : k + 1]), jnp.asarray(back[k : k + 1])
            new, g = _back(model.blocks[i], params, given[0], angles, given[1])
            back[k] = g[0]
            squares = {name: new[name] + squares.get(name, 0.0) for name in new}
        for name, square in squares.items():
            full = f"blk.{i}.{name}.weight"
            x = np.asarray(params[name]["weight"])
            found[full] = _weight(np.asarray(square), x, importance.get(full)) / (samples * length)
        progress(2 * count + 1 - i, steps)
    looked_up = _of_lookups(model, tokens, back, importance) / (samples * length)
    found["token_embd.weight"] = found.get("token_embd.weight", 0.0) + looked_up
    return found


@partial(jax.jit, static_argnums=0)
def _back(block: Block, params: Mapping, x: Array, angles: Array, g: Array) -> tuple[dict[str, Array], Array]:
    """Squares of the gradients of a block's matrices, and the gradient of its input."""
    _, pull = jax.vjp(lambda p, x: run_block(block, p, x, angles), params, x)
    of_params, of_x = pull(g)
    return {name: g**2 for name, g in matrices(of_params).items()}, of_x


def _through_output(
    model: Decoder, x: np.ndarray, importance: Mapping[str, np.ndarray], key: Array
) -> tuple[dict[str, float], np.ndarray]:
    """The weight of the output matrix, and the gradients of its input [s, t, width]."""
    back = np.empty_like(x)
    name, slabs = model.output_name, model.output_slabs()
    parts = [jnp.zeros((stop - start, model.width), jnp.float32) for start, stop in slabs]
    for k in range(len(x)):
        given = jnp.asarray(x[k : k + 1])
        logits, pull = jax.vjp(model.logits, given)
        labels = jax.random.categorical(jax.random.fold_in(key, k), logits)
        g = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        back[k] = pull(g)[0][0]
        for i, (start, stop) in enumerate(slabs):
            rows = jnp.asarray(model.tensors.rows(name, start, stop))
            of_rows = jax.vjp(lambda rows, x=given: model.project(rows, x), rows)[1](g[..., start:stop])[0]
            parts[i] = parts[i] + of_rows**2
    square = np.concatenate([np.asarray(part) for part in parts])
    tensor = model.tensors.tensor(name)
    return {name: _weight(square, tensor, importance.get(name)) / (x.shape[0] * x.shape[1])}, back


def _of_lookups(
    model: Decoder, tokens: np.ndarray, back: np.ndarray, importance: Mapping[str, np.ndarray]
) -> float:
    """½ Σ F e² of the token embeddings by the inputs that they make."""
    name = "token_embd.weight"
    tensor = model.tensors.tensor(name)
    square = np.zeros_like(tensor)
    for k in range(len(tokens)):
        of_rows = np.zeros_like(tensor)
        np.add.at(of_rows, tokens[k], back[k] * np.float32(model.embedding_scale))
        square += of_rows**2
    return _weight(square, tensor, importance.get(name))


def _weight(square: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> float:
    """½ Σ F e² / (Σ w e² / Σ w x²) with e² as in `local_squares`; any scale of e."""
    e2 = local_squares(x)
    damage = float((square * e2).sum(dtype=np.float64)) / 2
    error = relative_error(e2, x, importance)
    return damage / error if error > 0 else 0.0
