"""How far each matrix alone moves the predictions: weights for `sensitivity` from measured divergences.

Every matrix in turn is disturbed as a quantizer would disturb it, all others left as they are, and carried on
to the model's end. Those of a wave of blocks go on together, block after block, so that a wave loads a block
once; as many blocks make a wave as memory holds the activations of. Half the blocks lie behind a matrix on
average: some 4 forward passes for each block of 7 matrices. Nothing is differentiated, and no order of the
divergence left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jquant.allocation.noise import disturbed
from jquant.calibration import Progress, walk
from jquant.calibration.activations import IN_MEMORY
from jquant.core import kl_divergence
from jquant.models import Decoder

STRIDE = 4  # of so many tokens one is asked for the next: neighbours tell much the same


def measured_weights(
    model: Decoder,
    tokens: Int[np.ndarray, "s t"],
    importance: Mapping[str, Float[np.ndarray, "matrices cols"]],
    *,
    known: Collection[str] = (),
    seed: int = 0,
    progress: Progress = lambda done, count: None,
) -> Iterator[dict[str, float]]:
    """Of the matrices of a wave after the other: nats a token for a relative error of 1.

    known: matrices that need not be measured again, by GGUF name. Float32.
    """
    count, x = len(model.blocks), model.embed(tokens)
    size = 2 * x.nbytes * max(len(block.shapes) for block in model.blocks)
    step = max(IN_MEMORY // 2 // size, 1)  # blocks of a wave
    done, total = 0, sum(count - start for start in range(0, count, step))

    for start in range(0, count, step):
        after, changed, errors = x, dict[str, np.ndarray](), dict[str, float]()
        for at in walk(model, tokens.shape[1], range(start, count)):
            changed = {name: at.outputs(y) for name, y in changed.items()}
            if at.i < start + step:
                for name, noisy, error in disturbed(at.params, at.i, importance, known=known, seed=seed):
                    changed[name], errors[name] = at.outputs(after, noisy), error
            after = at.outputs(after)
            if at.i + 1 == start + step:
                x = after
            done += 1
            progress(done, total)
            if at.i + 1 >= start + step and not changed:
                break  # all of this wave is known
        divergences = _divergences(model, after, changed) if changed else {}
        yield {name: d / errors[name] if errors[name] > 0 else 0.0 for name, d in divergences.items()}


def _divergences(model: Decoder, x: np.ndarray, changed: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean KL divergence of the predictions from what they are after x."""
    divergences = dict.fromkeys(changed, 0.0)
    for k in range(len(x)):
        logits = model.logits(jnp.asarray(x[k : k + 1, ::STRIDE]))
        for name, y in changed.items():
            others = model.logits(jnp.asarray(y[k : k + 1, ::STRIDE]))
            divergences[name] += float(jnp.mean(kl_divergence(logits, others)))
    return {name: value / len(x) for name, value in divergences.items()}
