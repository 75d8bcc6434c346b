"""Formats of safetensors: codes and scales against closed forms, exhaustive search and ml_dtypes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import specs
from helpers import tables

from jquant import SCALED_FORMATS, QuantizedTensor, dequantize, quantize


def quick(chosen: str, zeros: bool = True) -> list:
    """Parameters: one format in every run."""
    names = [name for name, format in SCALED_FORMATS.items() if zeros or not format.zeros]
    return [
        pytest.param(SCALED_FORMATS[one.id], id=one.id, marks=one.marks)
        for one in tables.rows(names, {chosen})
    ]


every_format = pytest.mark.parametrize("format", quick("INT8"))
UINT4 = SCALED_FORMATS["UINT4"]
about_zero = pytest.mark.parametrize("format", quick("INT8", zeros=False))
weighted_or_not = pytest.mark.parametrize(
    "weighted",
    [pytest.param(False, id="plain", marks=pytest.mark.every), pytest.param(True, id="importance")],
)
RANGES = {"INT8": (-127, 127, 127), "FP8": (-448, 448, 448), "INT4": (-8, 7, 7.5)}


def rounded(name: str, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x as this type has it with these scales, in NumPy."""
    lowest, highest, _ = RANGES[name]
    q = np.clip(x / scale, lowest, highest)
    return scale * (q.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) if name == "FP8" else np.rint(q))


def loss(x: np.ndarray, rounded: np.ndarray, w: np.ndarray | float = 1.0) -> np.ndarray:
    return np.sum(w * (x - rounded) ** 2, axis=-1)


@about_zero
@weighted_or_not
def test_the_error_is_near_that_of_the_best_of_a_thousand_scales(format, weighted):
    cols, group = 1024, format.group_size or 1024
    x = specs.student_t(24, cols).astype(np.float64)
    w = specs.importance(cols) if weighted else np.ones(cols)
    q = quantize(jnp.asarray(x, jnp.float32), format, jnp.asarray(w, jnp.float32) if weighted else None)
    x, w, found = (
        a.reshape(-1, group) for a in (x, np.broadcast_to(w, x.shape), np.asarray(dequantize(q), np.float64))
    )
    absmax = np.abs(x).max(-1, keepdims=True)
    clips = np.linspace(0.3, 1.1, 1000)
    best = np.min(
        [loss(x, rounded(format.name, x, absmax * c / RANGES[format.name][2]), w) for c in clips], 0
    )
    assert loss(x, found, w).sum() <= 1.08 * best.sum()
    plain = loss(x, rounded(format.name, x, absmax / RANGES[format.name][2]), w)
    assert loss(x, found, w).sum() < plain.sum()


@about_zero
@pytest.mark.parametrize("type", tables.rows(["F32", "F16", "BF16"], {"F16"}))
def test_codes_are_the_nearest_for_the_scale_as_it_is_stored(format, type):
    x = specs.student_t(16, 256)
    stored = quantize(jnp.asarray(x), replace(format, scale_type=type))
    scale = np.asarray(stored.parts["weight_scale"]).astype(np.float64)
    assert (
        stored.parts["weight_scale"].dtype == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[type]
    )
    wanted = rounded(format.name, x.astype(np.float64).reshape(scale.size, -1), scale.reshape(-1, 1))
    np.testing.assert_allclose(np.asarray(dequantize(stored)).reshape(wanted.shape), wanted, rtol=1e-6)


@every_format
def test_zeros_stay_zero_and_the_largest_float_stays_finite(format):
    x = np.zeros((3, 128), np.float32)
    x[1, 5] = np.finfo(np.float16).max
    x[2] = 1e-30
    found = np.asarray(dequantize(quantize(jnp.asarray(x), format)))
    assert (found[0] == 0).all()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1], x[1], rtol=0.04)


@every_format
def test_a_stack_has_the_codes_of_its_matrices(format):
    x = jnp.asarray(specs.student_t(12, 128).reshape(3, 4, 128))
    whole = quantize(x, format)
    assert whole.shape == x.shape
    for part in (
        jax.vmap(lambda x: quantize(x, format).parts)(x),
        jax.jit(lambda x: quantize(x, format))(x).parts,
    ):
        for name, value in part.items():
            assert (np.asarray(value) == np.asarray(whole.parts[name])).all()


def test_four_bits_are_packed_from_the_lowest():
    format = SCALED_FORMATS["INT4"]
    codes = np.tile(np.arange(-8, 8), 8)[None]
    word = int(np.uint32(sum((int(c) + 8) << (4 * i) for i, c in enumerate(codes[0, :8]))))
    packed = np.asarray(format.pack(jnp.asarray(codes, jnp.int8))).view(np.uint32)
    assert packed.shape == (1, 16)
    assert packed[0, 0] == word == 0x76543210
    scale = jnp.full((1, 1), 0.5)
    q = QuantizedTensor({"weight_packed": jnp.asarray(packed.view(np.int32)), "weight_scale": scale}, format)
    np.testing.assert_array_equal(dequantize(q), codes * 0.5)


@pytest.mark.parametrize("shift", [0.0, 1.0, 4.0])
@weighted_or_not
def test_a_zero_makes_the_error_near_that_of_the_best_scale_and_zero_there_are(weighted, shift):
    """All zeros, each with 200 scales; rows that lie more and more to one side."""
    x = (specs.student_t(4, 256) + shift * 0.5).astype(np.float64).reshape(-1, 128)
    w = specs.importance(256).astype(np.float64)
    q = quantize(
        jnp.asarray(x.reshape(4, 256), jnp.float32), UINT4, jnp.asarray(w, jnp.float32) if weighted else None
    )
    w = np.tile(w.reshape(2, 128), (4, 1)) if weighted else np.ones_like(x)
    span = np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0)
    best = np.full(len(x), np.inf)
    for zero in range(16):
        for clip in np.linspace(0.4, 1.1, 200):
            scale = (span * clip / 15)[:, None]
            codes = np.clip(np.rint(x / scale) + zero, 0, 15)
            best = np.minimum(best, loss(x, (codes - zero) * scale, w))
    found = np.asarray(dequantize(q), np.float64).reshape(-1, 128)
    assert loss(x, found, w).sum() <= 1.03 * best.sum()


@pytest.mark.parametrize("type", tables.rows(["F32", "F16", "BF16"], {"F16"}))
def test_codes_with_a_zero_are_the_nearest_for_the_scale_as_it_is_stored(type):
    x = specs.student_t(16, 256) + np.float32(0.3)
    stored = quantize(jnp.asarray(x), replace(UINT4, scale_type=type))
    scale, zero = (np.asarray(stored.parts[p]).astype(np.float64)[..., None] for p in UINT4.scale_parts)
    assert set(np.unique(zero)) <= set(range(16))
    groups = x.astype(np.float64).reshape(16, 2, 128)
    wanted = (np.clip(np.rint(groups / scale) + zero, 0, 15) - zero) * scale
    np.testing.assert_allclose(np.asarray(dequantize(stored)).reshape(wanted.shape), wanted, rtol=1e-6)


def test_rows_that_are_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="multiple of 128"):
        quantize(jnp.ones((2, 96)), SCALED_FORMATS["INT4"])
