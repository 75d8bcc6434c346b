"""How well a model predicts a text, and how far a quantized model has moved from its original.

Arrays in, statistics out. p is the original's distribution of the next token, q the candidate's, t the token
that comes next. Per scored token:

    nll = −log q[t]                         perplexity = exp(mean nll)
    kld = Σ p log(p/q)                      nats
    Δp  = q[t] − p[t]
    top-1 agreement: argmax p = argmax q

Sums over a vocabulary are float32 on the device; statistics over tokens are float64 on the host. Standard
errors take tokens as independent, as llama-perplexity does.
Source: llama.cpp, tools/perplexity/perplexity.cpp, for definitions and errors; KL divergence is exact here,
of the whole vocabulary, where llama-perplexity leaves out tokens of p < e⁻¹⁶.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

QUANTILES = {"kld_median": 0.5, "kld_90": 0.9, "kld_99": 0.99, "kld_999": 0.999}


class Prediction(NamedTuple):
    """What a model expects at n positions."""

    logp: Float[Array, "n vocab"]  # normalised
    nll: Float[Array, " n"]  # of the token that comes
    top: Int[Array, " n"]  # the most probable token


@jax.jit
def predict(logits: Float[Array, "n vocab"], targets: Int[Array, " n"]) -> Prediction:
    """log-softmax of the logits, and what it says of the tokens that come."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
    return Prediction(logp, nll, jnp.argmax(logits, axis=-1).astype(jnp.int32))


class Tokens(NamedTuple):
    """A file at every scored token; what compares it is None where there is no original."""

    nll: Float32[np.ndarray, " n"]
    kld: Float32[np.ndarray, " n"] | None = None
    base_nll: Float32[np.ndarray, " n"] | None = None
    agrees: Bool[np.ndarray, " n"] | None = None


def join(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of several chunks as one."""

    def column(name: str) -> np.ndarray | None:
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        return np.concatenate(values) if values else None

    nll = np.concatenate([part.nll for part in parts])
    return Tokens(nll, column("kld"), column("base_nll"), column("agrees"))


class Estimate(NamedTuple):
    value: float
    error: float  # standard error


def mean(x: np.ndarray) -> Estimate:
    """Mean and √(variance/(n−1)); NaN is the error of a single value, and of an infinite mean."""
    x = np.asarray(x, np.float64)
    value = float(x.mean())
    with np.errstate(invalid="ignore"):
        error = float(np.sqrt(x.var() / (x.size - 1))) if x.size > 1 else float("nan")
    return Estimate(value, error)


def perplexity(nll: Float32[np.ndarray, " n"]) -> Estimate:
    """exp(mean nll); its error is that of the mean times the perplexity."""
    value, error = mean(nll)
    with np.errstate(over="ignore"):
        ppl = float(np.exp(value))
    return Estimate(ppl, ppl * error)


class Scores(NamedTuple):
    """Statistics of a file on a text. Probabilities and shares are between 0 and 1, divergences in nats."""

    tokens: int
    perplexity: Estimate
    log_ratio: Estimate | None = None  # mean of nll − the original's, whose tokens are paired
    kld: Estimate | None = None
    quantiles: Mapping[str, float] | None = None  # of kld, exact; see QUANTILES
    kld_max: float | None = None
    top1: Estimate | None = None
    delta_p: Estimate | None = None
    delta_p_rms: Estimate | None = None


def summarize(tokens: Tokens) -> Scores:
    """Statistics over all scored tokens."""
    ppl = perplexity(tokens.nll)
    n = tokens.nll.size
    if tokens.kld is None or tokens.base_nll is None or tokens.agrees is None:
        return Scores(n, ppl)
    kld = tokens.kld.astype(np.float64)
    change = np.exp(-tokens.nll.astype(np.float64)) - np.exp(-tokens.base_nll.astype(np.float64))
    with np.errstate(invalid="ignore"):  # between two infinite values
        levels = np.quantile(kld, list(QUANTILES.values()))
    return Scores(
        n,
        ppl,
        mean(tokens.nll.astype(np.float64) - tokens.base_nll),
        mean(kld),
        {name: float(level) for name, level in zip(QUANTILES, levels, strict=True)},
        float(kld.max()),
        mean(tokens.agrees),
        mean(change),
        root_mean_square(change),
    )


def root_mean_square(x: np.ndarray) -> Estimate:
    """√mean(x²), and by propagation the error of mean(x²) / (2 √mean(x²))."""
    square, error = mean(np.square(np.asarray(x, np.float64)))
    root = float(np.sqrt(square))
    return Estimate(root, error / (2 * root) if root else 0.0)


class Accuracy(NamedTuple):
    """Share of multiple-choice questions whose right answer has the highest log-likelihood."""

    questions: int
    plain: Estimate
    normalized: Estimate  # log-likelihood divided by the answer's length in bytes of UTF-8


def accuracy(
    likelihoods: Sequence[Float32[np.ndarray, " _"]],
    lengths: Sequence[Int[np.ndarray, " _"]],
    answers: Sequence[int],
) -> Accuracy:
    """likelihoods: of each question, the sum of log-probabilities of each choice's tokens. lengths: of each
    choice, bytes. answers: the right choice."""
    plain = [np.argmax(found) == a for found, a in zip(likelihoods, answers, strict=True)]
    scaled = [
        np.argmax(found / size) == a for found, size, a in zip(likelihoods, lengths, answers, strict=True)
    ]
    return Accuracy(len(answers), mean(np.array(plain)), mean(np.array(scaled)))
