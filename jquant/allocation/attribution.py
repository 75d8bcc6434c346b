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

from jquant.calibration import Turn, batches, forward_back
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
    totals = dict[str, float]()

    def into_head(y: np.ndarray, g: np.ndarray) -> None:
        totals["divergence"], totals[quantized.output_name] = _through_output(original, quantized, x, y, g)

    back, into_embeddings = partial(_back_through_block, original), np.empty(x.shape, np.float32)
    blocks = list(forward_back(quantized, tokens, into_head, back, embeddings=into_embeddings))
    divergence = totals.pop("divergence")
    moved = quantized.embed(tokens) - original.embed(tokens)
    of_embeddings = float((into_embeddings * moved).sum(dtype=np.float64)) / 2
    totals[EMBEDDINGS] = totals.get(EMBEDDINGS, 0.0) + of_embeddings
    return Shares(divergence, {name: share for found in (totals, *blocks) for name, share in found.items()})


def _back_through_block(
    original: Decoder, at: Turn, x: np.ndarray, behind: np.ndarray, before: np.ndarray | None
) -> dict[str, float]:
    """Shares of a block's matrices."""
    changes, found = _changes(at.params, original.load_block(at.i)), dict[str, float]()
    for part in batches(len(x), 1):
        given = jnp.asarray(x[part]), at.angles, jnp.asarray(behind[part])
        new, g = _back(at.block, at.params, changes, *given)
        if before is not None:
            before[part] = g
        for name, value in new.items():
            full = f"blk.{at.i}.{name}.weight"
            found[full] = found.get(full, 0.0) + float(value) / 2
    return found


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
    original: Decoder, quantized: Decoder, x: np.ndarray, y: np.ndarray, back: np.ndarray
) -> tuple[float, float]:
    """The divergence, and the share of the output matrix; the gradients of its input y go into `back`."""
    divergence = share = 0.0
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
    return divergence, share
