"""What rounding is estimated to cost at one place of a block, and factors of less of it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.smoothquant import smooth
from jquant.smoothquant._channels import DESCENT, Seen, descend, estimate
from jquant.smoothquant._smooth import Coupling, of_inputs

WIDTH, ROWS, TOKENS = 64, 48, 4096
PLAIN = Coupling("ffn_up", "ffn_up", 0, WIDTH, ("ffn_down",))
HEADS = Coupling("attn_v", "attn_v", 0, WIDTH // 2, ("attn_output",), heads=(2, 2))


def heavy(seed: int, tokens: int = TOKENS) -> np.ndarray:
    """Inputs with large channels, and in each token a few large values elsewhere, as a gate makes them."""
    rng, channels = np.random.default_rng(seed), np.random.default_rng(0)
    return rng.standard_t(3, (tokens, WIDTH)) * np.exp(1.5 * channels.standard_normal(WIDTH))


def seen(seed: int = 1) -> Seen:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((ROWS, WIDTH)) * np.exp(0.5 * rng.standard_normal(WIDTH))
    counts = rng.uniform(0.5, 2.0, ROWS)
    arrays = (heavy(seed), np.full(TOKENS, 1 / TOKENS), weight, counts)
    return Seen(*(jnp.asarray(a, jnp.float32) for a in arrays))


def lost(own: Seen, s: np.ndarray, steps: str = "token") -> float:
    """What the weighted output loses by rounding, multiplied out in float64."""
    x, v, w, rows = (np.asarray(a, np.float64) for a in own)
    scaled = x / s
    step = np.abs(scaled).max(axis=None if steps == "tensor" else 1, keepdims=True) / 127.5
    if steps == "range":
        step = (scaled.max(1, keepdims=True) - scaled.min(1, keepdims=True)) / 255
    row_step = np.abs(w * s).max(axis=1, keepdims=True) / 127
    off = (np.rint(x / s / step) * step) @ (np.rint(w * s / row_step) * row_step).T - x @ w.T
    return float(v @ np.square(off) @ rows)


@pytest.mark.parametrize("steps", ["token", "tensor", "range"])
@pytest.mark.parametrize("alpha", [None, 0.5, pytest.param(0.8, marks=pytest.mark.every)])
def test_the_estimate_is_what_rounding_costs(alpha, steps):
    own = seen()
    largest = (jnp.max(jnp.abs(a), axis=0) for a in (own.x, own.weight))
    logs = jnp.zeros(WIDTH) if alpha is None else smooth(*largest, alpha)
    found = float(estimate(PLAIN, logs, own, steps))
    assert found == pytest.approx(lost(own, np.exp(np.asarray(logs, np.float64)), steps), rel=0.05)
    # A factor common to all channels changes nothing.
    assert float(estimate(PLAIN, logs + 1.0, own, steps)) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("coupling", [PLAIN, HEADS], ids=["plain", "heads"])
def test_descending_leaves_less_than_any_alpha_on_tokens_it_has_not_seen(coupling):
    own, other = seen(1), seen(3)
    x, w = (jnp.max(jnp.abs(a), axis=0) for a in (own.x, own.weight))
    if coupling.heads:
        x, w = (jnp.max(a.reshape(2, 2, -1), axis=1).reshape(-1) for a in (x, w))
    starts = [smooth(x, w, alpha) for alpha in np.arange(0, 1.01, 0.1)]
    best = min(starts, key=lambda logs: float(estimate(coupling, logs, own)))
    found = descend(coupling, best, own, DESCENT._replace(tokens=512, rows=16))
    assert found.shape == (coupling.channels,)

    def remaining(logs) -> float:
        return lost(other, np.exp(np.asarray(of_inputs(coupling, logs), np.float64)))

    assert remaining(found) < 0.85 * min(map(remaining, starts))


def test_what_nothing_is_known_of_stays():
    own = seen()
    dead = own._replace(
        x=own.x.at[:, 5].set(0.0).at[7].set(0.0), weight=own.weight.at[:, 9].set(0.0).at[3].set(0.0)
    )
    found = np.asarray(descend(PLAIN, jnp.zeros(WIDTH), dead, DESCENT._replace(steps=20)))
    assert np.isfinite(found).all()
    assert found[5] == 0
    assert (found != 0).sum() > WIDTH / 2
    nothing = own._replace(x=jnp.zeros_like(own.x))
    np.testing.assert_array_equal(descend(PLAIN, jnp.zeros(WIDTH), nothing, DESCENT._replace(steps=2)), 0)
