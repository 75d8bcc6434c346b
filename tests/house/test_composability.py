"""Formats inside a researcher's own code: a jitted, sharded training step, vmap over experts, checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from helpers import tables
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jquant import FORMATS, dequantize, quantize

MESH = Mesh(np.array(jax.devices()[:2]), ("rows",), axis_types=(AxisType.Auto,))
ROWS = NamedSharding(MESH, PartitionSpec("rows"))
WHOLE = NamedSharding(MESH, PartitionSpec())


def fake_quant(w, format):
    """What a runtime computes with, and the gradient of w itself: the straight-through estimator."""
    fixed = jax.lax.stop_gradient(w)  # before the search, whose loops have no gradient
    return w + (dequantize(quantize(fixed, format)) - fixed)


def train(format, sharding, steps=30):
    """A linear layer that learns to do in its format what another does in float32."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 256)), jnp.float32)
    y = x @ jnp.asarray(specs.gaussian(8, 256, seed=1)).T
    w = jax.device_put(jnp.asarray(specs.gaussian(8, 256, seed=2)), sharding)

    def loss(w):
        return jnp.mean((x @ fake_quant(w, format).T - y) ** 2)

    @jax.jit
    def step(w):
        value, gradient = jax.value_and_grad(loss)(w)
        return w - 0.4 * gradient, value

    losses = []
    for _ in range(steps):
        w, value = step(w)
        losses.append(float(value))
    return w, losses


a_format = pytest.mark.parametrize("name", ["IQ4_NL", pytest.param("Q4_K", marks=pytest.mark.every)])


@pytest.mark.parametrize("name", tables.rows(["Q4_0", "Q4_K"], {"Q4_0"}))
def test_a_sharded_training_step_with_fake_quant_learns_as_on_one_device(name):
    _, losses = train(FORMATS[name], WHOLE)
    split, split_losses = train(FORMATS[name], ROWS)
    assert split.sharding.is_equivalent_to(ROWS, 2)
    assert losses[-1] < 0.2 * losses[0]
    np.testing.assert_allclose(split_losses[:10], losses[:10], rtol=1e-3)
    # What is left then is rounding: sums in another order now and then make a code go the other way.
    np.testing.assert_allclose(split_losses, losses, rtol=0.1)


def test_the_gradient_passes_straight_through():
    w = jnp.asarray(specs.gaussian(2, 64))
    x = jnp.arange(128.0, dtype=jnp.float32).reshape(2, 64)
    gradient = jax.grad(lambda w: jnp.sum(fake_quant(w, FORMATS["Q4_0"]) * x))(w)
    np.testing.assert_array_equal(gradient, x)


@a_format
def test_quantize_keeps_the_sharding_of_rows_and_its_bytes(name):
    w = jnp.asarray(specs.student_t(64, 512))
    encode = jax.jit(lambda w: quantize(w, FORMATS[name]).parts["blocks"], out_shardings=ROWS)
    split = encode(jax.device_put(w, ROWS))
    assert [shard.data.shape[0] for shard in split.addressable_shards] == [32, 32]
    np.testing.assert_array_equal(split, quantize(w, FORMATS[name]).parts["blocks"])


@a_format
def test_vmap_over_experts_with_their_own_importance_is_each_on_its_own(name):
    experts = specs.student_t(12, 256).reshape(3, 4, 256)
    importance = np.stack([specs.importance(256, seed) for seed in range(3)])
    stacked = jax.jit(jax.vmap(lambda w, i: quantize(w, FORMATS[name], i)))(experts, importance)
    for k in range(3):
        one = quantize(jnp.asarray(experts[k]), FORMATS[name], jnp.asarray(importance[k]))
        np.testing.assert_array_equal(stacked.parts["blocks"][k], one.parts["blocks"])
    second = jax.tree.map(lambda a: a[1], stacked)
    np.testing.assert_array_equal(jax.vmap(dequantize)(stacked)[1], dequantize(second))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_orbax_restores_a_tree_of_quantized_tensors_to_its_shardings(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="needs orbax: pip install orbax-checkpoint")
    tree = {
        name: quantize(jnp.asarray(specs.gaussian(4, 256, seed)), FORMATS[name])
        for seed, name in enumerate(["IQ4_NL", "Q8_0"])
    }
    tree = jax.device_put(tree, ROWS)
    saver = checkpoint.StandardCheckpointer()
    saver.save(tmp_path / "tree", tree)
    saver.wait_until_finished()
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
    restored = saver.restore(tmp_path / "tree", like)
    saver.close()
    for name, q in tree.items():
        assert restored[name].format is FORMATS[name]
        assert restored[name].parts["blocks"].sharding.is_equivalent_to(ROWS, 2)
        np.testing.assert_array_equal(dequantize(restored[name]), dequantize(q))
