"""How much each matrix changes what its block puts out: weights for `sensitivity` from forward passes alone.

Every matrix in turn is disturbed as a quantizer would disturb it, all others left as they are, and the output
of its block is compared with what it was. Blocks are looked at one by one, so memory is one block's, and
nothing is differentiated. A change counts the same in every block: what later blocks make of it, only
gradients or measured divergences know.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.allocation.noise import disturbed
from jquant.calibration import Progress, batches, walk
from jquant.models import Decoder


def output_weights(
    model: Decoder,
    tokens: Int[np.ndarray, "s t"],
    importance: Mapping[str, Float[np.ndarray, "matrices cols"]],
    usual: Mapping[str, float],
    *,
    seed: int = 0,
    progress: Progress = lambda done, count: None,
) -> dict[str, float]:
    """Weight of each matrix of the blocks: mean over tokens of |Δy|² / |y|² for errors of relative error 1.

    y is the block's output, float32; per token, so that attention sinks count as one token each. usual: the
    weights that are usual, by name, in nats a token; those found have the same sum, since changes of outputs
    have no such unit. Takes one pass over the tokens for each matrix of a block, and one more.
    """
    x, weights = model.embed(tokens), dict[str, float]()
    for at in walk(model, tokens.shape[1]):
        y = at.outputs(x)
        for name, noisy, error in disturbed(at.params, at.i, importance, seed=seed):
            changed = at.outputs(x, noisy)
            changes = [_change(changed[part], y[part]) for part in batches(len(x), 1)]
            weights[name] = float(np.mean(changes)) / error if error > 0 else 0.0
        x = y
        progress(at.i + 1, len(model.blocks))
    total = sum(weights.values())
    unit = sum(usual[name] for name in weights if name in usual) / total if total > 0 else 0.0
    return {name: unit * value for name, value in weights.items()}


@jax.jit
def _change(new: Float[Array, "s t width"], old: Float[Array, "s t width"]) -> Float[Array, ""]:
    """Mean over tokens of |new − old|² / |old|²."""
    size = jnp.sum(old * old, axis=-1)
    return jnp.mean(jnp.sum((new - old) ** 2, axis=-1) / jnp.where(size > 0, size, 1.0))
