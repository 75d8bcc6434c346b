"""Products in 8-bit integers: the integers of NumPy, the same bits from each kernel, and gradients."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from helpers import tables

from jquant import SCALED_FORMATS, dequantize, quantize
from jquant.int8 import matmul, pallas_dot, xla_dot
from jquant.int8._kernel import by_kernel
from jquant.int8.rounding import int8

INT8 = SCALED_FORMATS["INT8"]
SHAPES = [(1, 64, 8), (5, 576, 192), (130, 300, 257), (256, 1536, 128)]
KERNELS = {"xla": xla_dot, "pallas": partial(pallas_dot, interpret=True)}


def operands(n: int, width: int, out: int):
    x = specs.student_t(n, width)
    x[0] = 0
    return jnp.asarray(x), quantize(jnp.asarray(specs.gaussian(out, width)), INT8)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("shape", tables.rows(SHAPES, {(130, 300, 257)}))
def test_the_integers_are_those_of_numpy(shape, kernel):
    x, w = operands(*shape)
    qx, sx = int8(x)
    sums = np.asarray(qx).astype(np.int64) @ np.asarray(w.parts["weight"]).astype(np.int64).T
    ones = jnp.ones((shape[0], 1)), jnp.ones((shape[2], 1))
    np.testing.assert_array_equal(kernel(qx, ones[0], w.parts["weight"], ones[1]), sums.astype(np.float32))
    scaled = sums.astype(np.float32) * np.asarray(sx) * np.asarray(w.parts["weight_scale"]).T
    np.testing.assert_array_equal(kernel(qx, sx, w.parts["weight"], w.parts["weight_scale"]), scaled)
    np.testing.assert_array_equal(matmul(x, w, dot=kernel), scaled)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.every), jnp.bfloat16])
@pytest.mark.parametrize("width", tables.rows([64, 300, 4096], {300}))
def test_the_kernel_rounds_inputs_to_the_same_bits(width, dtype):
    x = specs.student_t(37, width).astype(dtype)
    x[3], x[4, 7] = 0, -1e30
    made, wanted = by_kernel(jnp.asarray(x), interpret=True), int8(jnp.asarray(x))
    np.testing.assert_array_equal(made.codes, wanted.codes)
    np.testing.assert_array_equal(made.scale, wanted.scale)


def test_compiled_for_a_gpu_the_kernel_rounds_the_inputs(monkeypatch):
    x, w = operands(8, 300, 16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = jax.jit(matmul).trace(x.astype(jnp.bfloat16), w)
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_the_product_is_that_of_the_floats_within_eight_bits():
    x, w = operands(130, 1024, 96)
    wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T
    found = np.asarray(matmul(x, w))
    step = np.abs(np.asarray(x)).max(-1, keepdims=True) / 127.5
    # Rounding errors of 1024 inputs, each uniform in half a step to either side.
    expected = np.sqrt(step**2 / 12 * np.sum(np.asarray(dequantize(w), np.float64) ** 2, axis=-1)[None])
    assert np.sqrt(np.mean((found - wanted)[1:] ** 2 / expected[1:] ** 2)) == pytest.approx(1, abs=0.1)
    assert (found[0] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_gradients_pass_through_the_rounding(kernel):
    x, w = operands(6, 96, 40)
    target = jnp.asarray(specs.gaussian(6, 40))

    def loss(x, scale):
        q = type(w)({**w.parts, "weight_scale": scale}, w.format)
        return jnp.sum(matmul(x.reshape(2, 3, 96), q, dot=kernel).reshape(6, 40) * target)

    by_x, by_scale = jax.grad(loss, argnums=(0, 1))(x, w.parts["weight_scale"])
    np.testing.assert_allclose(by_x, np.asarray(target) @ np.asarray(dequantize(w)), rtol=1e-4, atol=1e-5)
    # In the scales the product is linear.
    step = jnp.zeros_like(w.parts["weight_scale"]).at[7, 0].set(1e-3)
    difference = loss(x, w.parts["weight_scale"] + step) - loss(x, w.parts["weight_scale"])
    np.testing.assert_allclose(by_scale[7, 0] * 1e-3, difference, rtol=2e-2)


def test_a_flax_model_trains_around_it():
    w = quantize(jnp.asarray(np.random.default_rng(1).standard_normal((16, 32)), jnp.float32), INT8)

    class Adapted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return matmul(x, w) + nn.Dense(16, kernel_init=nn.initializers.zeros)(x)

    rng = np.random.default_rng(0)
    x, model = jnp.asarray(rng.standard_normal((8, 32)), jnp.float32), Adapted()
    params = model.init(jax.random.key(0), x)
    y = x @ dequantize(w).T

    @jax.jit
    def step(params):
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((model.apply(p, x) - 1.1 * y) ** 2))(params)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    first, params = step(params)
    for _ in range(200):
        loss, params = step(params)
    assert loss < 0.1 * first


def test_what_does_not_fit_is_refused():
    x, w = operands(4, 64, 8)
    with pytest.raises(ValueError, match="last axes"):
        matmul(x[:, :32], w)
    with pytest.raises(ValueError, match="format INT8"):
        matmul(x, quantize(jnp.ones((8, 64)), SCALED_FORMATS["FP8"]))
