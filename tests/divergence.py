"""KL divergence of decoders that are run whole, and decoders with one tensor changed: a test oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jquant import models
from jquant.checkpoints.weights import Weights


def divergence(a: models.Decoder, b: models.Decoder, tokens: np.ndarray) -> float:
    """KL divergence from a to b, nats a token, both run whole."""
    logits = []
    for decoder in (a, b):
        x = jnp.asarray(decoder.embed(tokens))
        for i, block in enumerate(decoder.blocks):
            angles = jnp.asarray(decoder.angles(i, tokens.shape[1]))
            x = models.run_block(block, decoder.load_block(i), x, angles)
        logits.append(jax.nn.log_softmax(decoder.logits(x)))
    p, q = logits
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


class Noisy:
    """The weights of a source with one tensor changed."""

    def __init__(self, weights: Weights, name: str, value: np.ndarray):
        self.specs, self._weights, self._name, self._value = weights.specs, weights, name, value

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        found = self._weights.rows(name, start, stop)
        return self._value[start:stop] if name == self._name else found

    def tensor(self, name: str) -> np.ndarray:
        return self.rows(name).reshape(self.specs[name].shape)
