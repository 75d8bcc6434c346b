"""How much of a quantized model's KL divergence each of its tensors accounts for.

With e the change of a tensor by quantization and g the gradient of the divergence there, the tensor's share
is ½ ⟨g, e⟩. To second order the divergence is ½ eᵀHe and g = He, so that shares add up to it. Far from the
original neither holds, but ⟨g, e⟩ still says how fast the divergence falls as this tensor alone goes back to
its original: what a change of its type is worth now, where a sum of single damages no longer tells. One pass
forward and one back through the quantized model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.calibration.activations import Scratch
from jquant.core import Block, kl_divergence, kl_gradient
from jquant.models import Decoder, matrices, run_block

EMBEDDINGS = "token_embd.weight"


class Shares(NamedTuple):
    divergence: float  # mean over tokens, nats
    of: dict[str, float]  # of each matrix that differs; noise makes some of them negative


def shares(
    original: Decoder,
    quantized: Decoder,
    x: Float[np.ndarray, "s t width"],
    tokens: Int[np.ndarray, "s t"],
) -> Shares:
    """x: the output of the original's last block. Float32."""
    samples, length = tokens.shape
    count = len(quantized.blocks)
    scratch = Scratch().activations(0, (count + 1, samples, length, quantized.width))
    scratch[0] = quantized.embed(tokens)
    for i in range(count):
        params, angles = quantized.load_block(i), jnp.asarray(quantized.angles(i, length))
        for k in range(samples):
            given = jnp.asarray(scratch[i, k : k + 1])
            scratch[i + 1, k] = run_block(quantized.blocks[i], params, given, angles)[0]
    divergence, of_output, back = _through_output(original, quantized, x, scratch[count])
    found = {quantized.output_name: of_output}
    for i in range(count - 1, -1, -1):
        params, angles = quantized.load_block(i), jnp.asarray(quantized.angles(i, length))
        changes = _changes(params, original.load_block(i))
        for k in range(samples):
            given = jnp.asarray(scratch[i, k : k + 1]), jnp.asarray(back[k : k + 1])
            new, g = _back(quantized.blocks[i], params, changes, given[0], angles, given[1])
            back[k] = g[0]
            for name, value in new.items():
                full = f"blk.{i}.{name}.weight"
                found[full] = found.get(full, 0.0) + float(value) / 2
    moved = quantized.embed(tokens) - original.embed(tokens)
    found[EMBEDDINGS] = found.get(EMBEDDINGS, 0.0) + float((back * moved).sum(dtype=np.float64)) / 2
    return Shares(divergence, found)


def _changes(new: Mapping, old: Mapping) -> dict[str, Array]:
    """What quantization added to the matrices of a block."""
    return {name: weight - old[name]["weight"] for name, weight in matrices(new).items()}


@partial(jax.jit, static_argnums=0)
def _back(
    block: Block, params: Mapping, changes: Mapping[str, Array], x: Array, angles: Array, g: Array
) -> tuple[dict[str, Array], Array]:
    """⟨gradient, change⟩ of a block's matrices, and the gradient of its input."""
    _, pull = jax.vjp(lambda p, x: run_block(block, p, x, angles), params, x)
    of_params, of_x = pull(g)
    return {name: jnp.vdot(of_params[name]["weight"], change) for name, change in changes.items()}, of_x


def _through_output(
    original: Decoder, quantized: Decoder, x: np.ndarray, y: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """The divergence, the share of the output matrix, and the gradients [s, t, width] of its input y."""
    back, divergence, share = np.empty_like(y), 0.0, 0.0
    name, count = quantized.output_name, y.shape[0] * y.shape[1]
    for k in range(len(y)):
        given = jnp.asarray(y[k : k + 1])
        logits, pull = jax.vjp(quantized.logits, given)
        wanted = original.logits(jnp.asarray(x[k : k + 1]))
        divergence += float(jnp.sum(kl_divergence(wanted, logits))) / count
        g = kl_gradient(wanted, logits)
        back[k] = pull(g / count)[0][0]
        for start, stop in quantized.output_slabs():
            rows = jnp.asarray(quantized.tensors.rows(name, start, stop))
            change = rows - jnp.asarray(original.tensors.rows(name, start, stop))
            moved = jax.jvp(lambda r, x=given: quantized.project(r, x), (rows,), (change,))[1]
            share += float(jnp.vdot(g[..., start:stop], moved)) / (2 * count)
    return divergence, share, back
