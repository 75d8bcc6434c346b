"""How far one prediction of the next token is from another: the KL divergence, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@jax.jit
def kl_divergence(p: Float[Array, "*n vocab"], q: Float[Array, "*n vocab"]) -> Float[Array, "*n"]:
    """Σ p log(p/q) over the vocabulary, nats, of distributions given by logits; float32.

    Log-probabilities are logits too. Written as Σ (q − p + p log(p/q)), whose terms are ≥ 0: the same for
    distributions, and an error δ in the normalisation of either changes it by δ² rather than δ, so that it
    stays exact for models that are almost equal. 0 log 0 is 0; a token that p expects and q excludes makes it
    infinite.

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    >>> [round(float(nats), 4) for nats in jquant.evaluation.kl_divergence(p, q)]
    [0.1438]
    """
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    probabilities = jnp.exp(log_p)
    cost = jnp.where(probabilities > 0, probabilities * (log_p - log_q), jnp.zeros_like(probabilities))
    return jnp.sum(jnp.exp(log_q) - probabilities + cost, axis=-1)


@jax.jit
def kl_gradient(p: Float[Array, "*n vocab"], q: Float[Array, "*n vocab"]) -> Float[Array, "*n vocab"]:
    """∂KL(p ‖ q)/∂q = softmax(q) − softmax(p), with respect to the logits q."""
    return jnp.exp(_log_softmax(q)) - jnp.exp(_log_softmax(p))


def _log_softmax(logits: Float[Array, "*n vocab"]) -> Float[Array, "*n vocab"]:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
