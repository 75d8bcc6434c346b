"""The decoder of a file or folder, run whole, and with one tensor changed."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jquant import models
from jquant.checkpoints.model import open_model
from jquant.checkpoints.weights import Weights
from jquant.models import Decoder


def opened(path: Path) -> Decoder:
    model = open_model(path)
    return models.decoder(Weights(model.source), model.metadata)


def logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """[samples, tokens, vocab], block by block."""
    x = jnp.asarray(decoder.embed(tokens))
    for i, block in enumerate(decoder.blocks):
        x = models.run_block(block, decoder.load_block(i), x, decoder.angles(i, tokens.shape[1]))
    return np.asarray(decoder.logits(x))


class Noisy:
    """The weights of a source with one tensor changed."""

    def __init__(self, weights: Weights, name: str, value: np.ndarray):
        self.specs, self._weights, self._name, self._value = weights.specs, weights, name, value

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        found = self._weights.rows(name, start, stop)
        return self._value[start:stop] if name == self._name else found

    def tensor(self, name: str) -> np.ndarray:
        return self.rows(name).reshape(self.specs[name].shape)
