"""Q3_K and Q6_K: ggml's bits decoded, less error than ggml's encoder makes, nothing lost at the edges."""

from __future__ import annotations

from functools import cache

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from helpers import ggml, tables
from helpers.k_blocks import BLOCKS, decode, encode
from helpers.places import if_shared
from helpers.real_weights import smollm2
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.core import Format

every_format = pytest.mark.parametrize("format", tables.formats(["Q3_K", "Q6_K"], {"Q6_K"}))
STORIES = "data/models/stories15M/model.safetensors"
# What our error must be below, as a fraction of ggml's.
AT_MOST = {"Q3_K": 0.99, "Q6_K": 0.99}


def error(format: Format, data: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> float:
    """Σ w (x − x̂)² in float64, of what ggml decodes."""
    y = ggml.decode(format.ggml_type, data).astype(np.float64).reshape(x.shape)
    return float(((x - y) ** 2 * (1.0 if importance is None else importance)).sum())


def fraction_of_ggmls_error(format: Format, x: np.ndarray, importance: np.ndarray | None) -> float:
    ours = error(format, encode(format, x, importance), x, importance)
    return ours / error(format, ggml.encode(format.ggml_type, x, importance), x, importance)


@cache
def tensors() -> dict[str, np.ndarray]:
    """Random rows and parts of trained tensors, float32 [rows, cols], cols a multiple of 256."""
    weights = 1 << 18
    found = {name: make(128, 2048) for name, make in specs.DISTRIBUTIONS.items()}
    for name in ("blk.0.ffn_down.weight", "blk.7.ffn_down.weight", "blk.29.ffn_down.weight"):
        x = smollm2(name)
        found[name] = x[: weights // x.shape[1]]
    if stories := if_shared(STORIES):
        for name, x in specs.safetensors_matrices(stories, weights):
            if "layers.3." in name:
                found[name] = np.pad(x, ((0, 0), (0, -x.shape[1] % 256)))
    return found


@every_format
def test_the_error_is_below_ggmls(format):
    """Plain squared error, against the encoder that ggml uses without importance."""
    fractions = {name: fraction_of_ggmls_error(format, x, None) for name, x in tensors().items()}
    assert max(fractions.values()) < AT_MOST[format.name], fractions


@every_format
def test_the_weighted_error_is_below_ggmls(format):
    fractions = {}
    for name, x in tensors().items():
        fractions[name] = fraction_of_ggmls_error(format, x, specs.importance(x.shape[1]))
    assert max(fractions.values()) < AT_MOST[format.name], fractions


@every_format
def test_the_error_under_a_measured_imatrix_is_below_ggmls(format, shared):
    """A real imatrix has channels hundreds of times as important as the rest, and dead ones."""
    path = shared("data/reference/smol768-imatrix-60x512.gguf")
    entries = {t.name: np.array(t.data, np.float32).ravel() for t in gguf.GGUFReader(path).tensors}
    fractions = {}
    for name in ("blk.0.attn_q", "blk.3.ffn_down", "blk.11.ffn_down", "blk.16.attn_k", "blk.29.ffn_up"):
        key = f"{name}.weight"
        importance = entries[f"{key}.in_sum2"] / entries[f"{key}.counts"]
        x = specs.student_t(96, len(importance))
        fractions[name] = fraction_of_ggmls_error(format, x, importance)
    assert max(fractions.values()) < AT_MOST[format.name], fractions


@every_format
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_blocks_at_the_edges_stay_finite_and_cost_no_more_than_ggmls(format, weighted):
    importance = specs.importance(256) if weighted else None
    for what, edge in specs.edge_blocks().items():
        x = edge[: len(edge) // 8 * 8][: 8 * BLOCKS].reshape(-1, 256)
        decoded = decode(format, encode(format, x, importance))
        assert np.isfinite(decoded).all(), what
        assert (decoded[(x == 0).all(axis=1)] == 0).all(), what
        representable = np.abs(x).max(axis=1) < 1e6
        x, decoded = x[representable].astype(np.float64), decoded[representable]
        theirs = ggml.decode(format.ggml_type, ggml.encode(format.ggml_type, x, importance))
        w = 1.0 if importance is None else importance
        ours, limit = (w * (x - decoded) ** 2).sum(), (w * (x - theirs) ** 2).sum()
        assert ours <= limit * (1 + 1e-6), (what, ours / limit)


@every_format
def test_weights_beyond_the_largest_scale_saturate(format):
    x = np.full((1, 256), 1e10, np.float32)
    x[0, ::2] = -3e38
    decoded = decode(format, encode(format, x))
    largest = np.abs(decoded).max()
    assert np.isfinite(largest)
    assert (np.sign(decoded) == np.sign(x)).all()
    assert (np.abs(decoded) > 0.5 * largest).all()


@every_format
def test_the_one_weight_that_matters_is_kept(format):
    x, w = specs.gaussian(64, 256), np.zeros(256, np.float32)
    w[37] = 1
    decoded = decode(format, encode(format, x, w))
    np.testing.assert_allclose(decoded[:, 37], x[:, 37], rtol=2e-3, atol=1e-6)


@every_format
def test_codes_for_fixed_scales_are_the_nearest(format):
    x = specs.gaussian(32, 256).T
    scales = jax.jit(format.unpack)(encode(format, x.T).T)[1]
    codes = np.asarray(jax.jit(format.assign)(x, None, scales)).astype(int)
    reconstruct = jax.jit(format.reconstruct)
    low, high = (-4, 3) if format.name == "Q3_K" else (-32, 31)
    best = np.full(x.shape, np.inf)
    for code in range(low, high + 1):
        y = reconstruct(np.full(x.shape, code, np.int8), scales)
        best = np.minimum(best, np.abs(x - np.asarray(y, np.float64)))
    y = np.asarray(reconstruct(codes.astype(np.int8), scales), np.float64)
    np.testing.assert_allclose(np.abs(x - y), best, rtol=1e-5, atol=1e-9)


@every_format
def test_decoding_any_bytes_gives_ggmls_bits(format):
    data = np.random.default_rng(0).integers(0, 256, (BLOCKS, format.block_bytes), dtype=np.uint8)
    ours = decode(format, data)
    peers = {"ggml": ggml.decode(format.ggml_type, data)}
    with np.errstate(invalid="ignore", over="ignore"):
        peers["gguf-py"] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(format.ggml_type))
    for peer, theirs in peers.items():
        same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
        assert same.all(), (peer, np.argwhere(~same)[:3])


@every_format
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_packing_is_the_inverse_of_unpacking(format, seed):
    data = np.random.default_rng(seed).integers(0, 256, (format.block_bytes, 8), dtype=np.uint8)
    data[-1] &= 0x3F  # d finite: a NaN's bits need not survive
    assert (np.asarray(repacked(format)(jnp.asarray(data))) == data).all()


@cache
def repacked(format: Format):
    return jax.jit(lambda data: format.pack(*format.unpack(data)))
