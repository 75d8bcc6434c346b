"""KL divergence in float64, by SciPy: the oracle of every other."""

from __future__ import annotations

import numpy as np
from scipy import special

from helpers.decoders import logits
from jquant.models import Decoder


def exact_kld(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """From p to q, nats, of each token: logits [..., vocab] → [...]."""
    p, q = (special.log_softmax(x.astype(np.float64), axis=-1) for x in (p, q))
    return special.rel_entr(np.exp(p), np.exp(q)).sum(-1)


def divergence(wanted: np.ndarray, got: np.ndarray) -> float:
    """Mean KL divergence from `wanted` to `got`, nats a token, of logits [..., vocab]."""
    return float(np.mean(exact_kld(wanted, got)))


def divergence_of_decoders(a: Decoder, b: Decoder, tokens: np.ndarray) -> float:
    """Mean KL divergence from a to b, nats a token, both run whole."""
    return divergence(logits(a, tokens), logits(b, tokens))


def distributions(n: int, vocab: int, distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of two models, float32 [n, vocab]."""
    rng = np.random.default_rng(seed)
    p = rng.standard_normal((n, vocab)) * 3
    return p.astype(np.float32), (p + distance * rng.standard_normal((n, vocab))).astype(np.float32)
