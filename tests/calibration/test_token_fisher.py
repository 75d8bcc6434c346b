"""The Fisher information of tokens, against gradients of the whole model and against divergence itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import write_tiny
from jax import Array

from jquant.calibration import token_fisher
from jquant.calibration.gradients import sampled_labels
from jquant.writers.folder_plan import open_checkpoint

TOKENS = np.random.default_rng(1).integers(3, 350, (6, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM")
    return open_checkpoint(folder).model.decoder()


def outputs(decoder, errors: Array) -> Array:
    """Logits where these errors [blocks, s, t, width] are added behind each block."""
    x = jnp.asarray(decoder.embed(TOKENS))
    for i, block in enumerate(decoder.blocks):
        angles = jnp.asarray(decoder.angles(i, TOKENS.shape[1]))
        x = block.apply({"params": decoder.load_block(i)}, x, angles) + errors[i]
    return decoder.logits(x)


def test_it_is_the_square_of_the_gradient_at_each_token(decoder):
    lengths = np.array([24, 24, 17, 24, 2, 1])
    found = token_fisher(decoder, TOKENS, lengths=lengths, batch=4, seed=3)
    labels = sampled_labels(3)
    counted = jnp.asarray(np.arange(24)[None] < lengths[:, None] - 1)

    def loss(errors: Array) -> Array:
        logits = outputs(decoder, errors)
        drawn = labels(jax.lax.stop_gradient(logits), TOKENS)
        told = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(counted, told, 0.0))

    gradient = jax.grad(loss)(jnp.zeros((len(decoder.blocks), *TOKENS.shape, decoder.width)))
    wanted = np.mean(np.square(np.asarray(gradient)), axis=-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6 * wanted.max())
    assert not found[:, 5].any()
    assert found[:, :4, :16].all()


def test_it_tells_the_divergence_that_errors_cause(decoder):
    fisher = np.mean([token_fisher(decoder, TOKENS, seed=seed) for seed in range(24)], axis=0)
    clean = jax.nn.log_softmax(outputs(decoder, jnp.zeros((len(decoder.blocks), 1, 1, 1))))
    scale = 1e-2 * float(jnp.std(decoder.embed(TOKENS)))
    for i in range(len(decoder.blocks)):
        measured, expected = [], []
        for seed in range(8):
            e = scale * jax.random.normal(jax.random.key(seed), (*TOKENS.shape, decoder.width))
            errors = jnp.zeros((len(decoder.blocks), *e.shape)).at[i].set(e)
            found = jax.nn.log_softmax(outputs(decoder, errors))
            measured.append(float(jnp.sum(jnp.exp(clean) * (clean - found), -1)[:, :-1].sum()))
            expected.append(float(np.sum(fisher[i] * np.sum(np.square(np.asarray(e)), -1))) / 2)
        assert np.mean(measured) == pytest.approx(np.mean(expected), rel=0.2)
