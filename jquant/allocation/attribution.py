"""How much of a quantized model's KL divergence each of its tensors accounts for.

With e the change of a tensor by quantization and g the gradient of the divergence there, the tensor's share
is ½ ⟨g, e⟩. To second order the divergence is ½ eᵀHe and g = He, so that shares add up to it. Far from the
original neither holds, but ⟨g, e⟩ still says how fast the divergence falls as this tensor alone goes back to
its original: what a change of its type is worth now, where a sum of single damages no longer tells. One pass
forward and one back through the quantized model.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jquant.calibration import Turn, forward_back, matrix_gradients
from jquant.core import kl_divergence, kl_gradient
from jquant.models import Decoder, matrices

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
    return Shares(divergence, {name: share for part in (totals, *blocks) for name, share in part.items()})


def _back_through_block(
    original: Decoder, at: Turn, x: np.ndarray, behind: np.ndarray, before: np.ndarray | None
) -> dict[str, float]:
    """Shares of a block's matrices."""
    old, changed = matrices(original.load_block(at.i)), matrices(at.params)
    changes = {name: weight - old[name] for name, weight in changed.items()}
    of_block = dict.fromkeys(changes, 0.0)
    for of_sample in matrix_gradients(at, x, behind, before):
        for name, g in of_sample.items():
            of_block[name] += float(jnp.vdot(g, changes[name])) / 2
    return {f"blk.{at.i}.{name}.weight": share for name, share in of_block.items()}


def _through_output(
    original: Decoder, quantized: Decoder, x: np.ndarray, y: np.ndarray, back: np.ndarray
) -> tuple[float, float]:
    """The divergence, and the share of the output matrix; the gradients of its input y go into `back`."""
    divergence = share = 0.0
    name, count = quantized.output_name, y.shape[0] * y.shape[1]
    for k in range(len(y)):
        one = jnp.asarray(y[k : k + 1])
        logits, pull = jax.vjp(quantized.logits, one)
        wanted = original.logits(jnp.asarray(x[k : k + 1]))
        divergence += float(jnp.sum(kl_divergence(wanted, logits))) / count
        g = kl_gradient(wanted, logits)
        back[k] = pull(g / count)[0][0]
        for start, stop in quantized.output_slabs():
            rows = jnp.asarray(quantized.tensors.rows(name, start, stop))
            change = rows - jnp.asarray(original.tensors.rows(name, start, stop))
            moved = jax.jvp(lambda r, x=one: quantized.project(r, x), (rows,), (change,))[1]
            share += float(jnp.vdot(g[..., start:stop], moved)) / (2 * count)
    return divergence, share
