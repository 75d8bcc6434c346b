"""Smoothing: the same function from other weights, for every architecture, and the formula of SmoothQuant."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import opened
from helpers.tables import rows
from helpers.tiny_models import write_tiny

from jquant.models import ARCHITECTURES, Block, run_block
from jquant.smoothquant import _smooth as smooth
from jquant.smoothquant._smooth import Coupling

CASES = {name: (name, {}) for name in ARCHITECTURES}
CASES["biases"] = ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True})
CASES["head_dim"] = ("LlamaForCausalLM", {"head_dim": 24})
CASES["many heads share"] = ("LlamaForCausalLM", {"num_attention_heads": 4, "num_key_value_heads": 1})
QUICK = {"LlamaForCausalLM", "Gemma2ForCausalLM", "Qwen2MoeForCausalLM"}
EXPECTED = {
    "LlamaForCausalLM": {"attn_norm", "attn_v", "ffn_norm", "ffn_up"},
    "Qwen2MoeForCausalLM": {"attn_norm", "attn_v", "ffn_norm", "ffn_up_exps", "ffn_up_shexp"},
}


@pytest.mark.parametrize("case", rows(CASES, QUICK))
def test_a_smoothed_block_computes_the_same(case, tmp_path):
    architecture, overrides = CASES[case]
    decoder = opened(write_tiny(tmp_path, architecture, **overrides))
    rng = np.random.default_rng(0)
    block, params = decoder.blocks[0], decoder.load_block(0)
    x = jnp.asarray(rng.standard_normal((2, 30, decoder.width)), jnp.float32)
    angles = jnp.asarray(decoder.angles(0, 30))
    found = smooth.couplings(block)
    if architecture in EXPECTED:
        assert {c.name for c in found} == EXPECTED[architecture]
    wanted = run_block(block, params, x, angles)
    for coupling in found:  # each place by itself, then all at once
        alone = {c.name: jnp.ones(c.shape) for c in found}
        alone[coupling.name] = jnp.asarray(np.exp(rng.standard_normal(coupling.shape)), jnp.float32)
        assert_same(block, params, alone, x, angles, wanted)
    together = {c.name: jnp.asarray(np.exp(rng.standard_normal(c.shape)), jnp.float32) for c in found}
    assert_same(block, params, together, x, angles, wanted)
    changed = smooth.smoothed(block, params, together)
    still = {name for name, p in params.items() if (p["weight"] == changed[name]["weight"]).all()}
    assert still <= {"attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"}


def assert_same(block, params, scales, x, angles, wanted) -> None:
    got = run_block(block, smooth.smoothed(block, params, scales), x, angles)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))


def test_inputs_are_divided_by_what_weights_are_multiplied_by(tmp_path):
    decoder = opened(write_tiny(tmp_path, "LlamaForCausalLM"))
    block, params, rng = decoder.blocks[0], decoder.load_block(0), np.random.default_rng(1)
    scales = {
        c.name: jnp.asarray(np.exp(rng.standard_normal(c.shape)), jnp.float32)
        for c in smooth.couplings(block)
    }
    x, angles = jnp.asarray(rng.standard_normal((1, 20, 64)), jnp.float32), jnp.asarray(decoder.angles(0, 20))

    def inputs(params):
        return block.apply({"params": params}, x, angles, mutable="inputs")[1]["inputs"]

    before, after = inputs(params), inputs(smooth.smoothed(block, params, scales))
    for coupling in smooth.couplings(block):
        s = smooth.of_inputs(coupling, scales[coupling.name])
        for name in coupling.consumers:
            wanted = np.asarray(before[name]["x"]) / np.asarray(s)
            np.testing.assert_allclose(after[name]["x"], wanted, rtol=2e-3, atol=1e-5)


def test_factors_are_those_of_the_paper_up_to_a_common_one():
    rng = np.random.default_rng(0)
    x, w = np.exp(rng.standard_normal((2, 3, 50)))
    for alpha in (0.0, 0.3, 1.0):
        s = x**alpha / w ** (1 - alpha)
        found = np.exp(smooth.smooth(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), alpha))
        ratio = found / s
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)
        np.testing.assert_allclose(np.log(found).mean(-1), 0, atol=1e-5)


def test_dead_channels_keep_their_weights_and_outliers_stay_within_float16():
    x = jnp.asarray([0.0, 1.0, 2.0, 1e30, 1.0])
    w = jnp.asarray([1.0, 0.0, 1.0, 1e-30, 1.0])
    s = np.exp(smooth.smooth(x, w, 0.5))
    assert np.isfinite(s).all()
    np.testing.assert_allclose(s[:2], 1, rtol=1e-6)
    assert s.max() <= 1.001 * smooth.SPAN


def test_maxima_of_shared_heads_are_those_of_any_head_that_takes_them():
    coupling = Coupling("attn_v", "attn_v", 0, 6, ("attn_output",), heads=(2, 3))
    x = np.random.default_rng(0).random(18).astype(np.float32)
    found = np.asarray(smooth.of_channels(coupling, jnp.asarray(x)))
    for channel in range(6):
        group, d = divmod(channel, 3)
        assert found[channel] == max(x[(3 * group + head) * 3 + d] for head in range(3))
    back = np.asarray(smooth.of_inputs(coupling, jnp.asarray(found)))
    assert (back >= x).all()


def test_a_block_without_a_place_is_refused():
    odd = Block(shapes=(("mixer_norm.weight", (8,)), ("mixer.weight", (8, 8))), eps=1e-5)
    with pytest.raises(ValueError, match="no place to smooth"):
        smooth.couplings(odd)


def test_factors_can_be_differentiated(tmp_path):
    decoder = opened(write_tiny(tmp_path, "MixtralForCausalLM"))
    block, params = decoder.blocks[0], decoder.load_block(0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, 64)), jnp.float32)
    angles = jnp.asarray(decoder.angles(0, 12))
    logs = {c.name: jnp.zeros(c.shape) for c in smooth.couplings(block)}

    def loss(logs):
        out = block.apply({"params": smooth.smoothed(block, params, jax.tree.map(jnp.exp, logs))}, x, angles)
        return jnp.mean(out**2)

    # The function does not depend on the factors.
    for name, g in jax.grad(loss)(logs).items():
        assert float(jnp.abs(g).max()) < 1e-4, name
