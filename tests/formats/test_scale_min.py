"""Q2_K, Q4_K, Q5_K: ggml's bits decoded, less error than ggml's encoder makes, nothing lost at the edges."""

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

STORIES = "data/models/stories15M/model.safetensors"
CODES = {"Q2_K": 4, "Q4_K": 16, "Q5_K": 32}
# What our error must be below, as a fraction of ggml's. Q2_K without importance: ggml minimises another norm.
AT_MOST = {"Q2_K": 0.97, "Q4_K": 0.99, "Q5_K": 0.98}
every_format = pytest.mark.parametrize("format", tables.formats(CODES, {"Q4_K"}))
with_and_without_importance = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])


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
    weights = 1 << 17
    found = {name: make(64, 2048) for name, make in specs.DISTRIBUTIONS.items()}
    for name in ("blk.0.ffn_down.weight", "blk.7.ffn_down.weight", "blk.29.ffn_down.weight"):
        x = smollm2(name)
        found[name] = x[: weights // x.shape[1]]
    if stories := if_shared(STORIES):
        for name, x in specs.safetensors_matrices(stories, weights):
            if "layers.3." in name:
                found[name] = np.pad(x, ((0, 0), (0, -x.shape[1] % 256)))
    return found


@every_format
@with_and_without_importance
def test_the_error_is_below_ggmls(format, weighted):
    """Of random rows and of trained tensors, under the importance that both encoders are given."""
    fractions = {}
    for name, x in tensors().items():
        importance = specs.importance(x.shape[1]) if weighted else None
        fractions[name] = fraction_of_ggmls_error(format, x, importance)
    assert max(fractions.values()) < AT_MOST[format.name], fractions


@every_format
def test_the_error_under_a_measured_imatrix_is_below_ggmls(format, shared):
    """In a real imatrix one channel counts a million times as much as its neighbours, and some not at all."""
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
@with_and_without_importance
def test_blocks_at_the_edges_stay_finite_and_cost_no_more_than_ggmls(format, weighted):
    importance = specs.importance(256) if weighted else None
    w = 1.0 if importance is None else importance.astype(np.float64)
    for what, edge in specs.edge_blocks().items():
        x = edge[: min(len(edge) // 8, BLOCKS) * 8].reshape(-1, 256)
        decoded = decode(format, encode(format, x, importance))
        assert np.isfinite(decoded).all(), what
        assert (decoded[(x == 0).all(axis=1)] == 0).all(), what
        representable = np.abs(x).max(axis=1) < 1e6
        x, decoded = x[representable].astype(np.float64), decoded[representable]
        theirs = ggml.decode(format.ggml_type, ggml.encode(format.ggml_type, x, importance))
        theirs = np.where(np.isfinite(theirs), theirs, 0)
        # An outlier alone is off by what float16 rounds away from d, and for one value either may be lucky.
        rounding = 2.0**-21 * (w * x * x).sum() if what == "one outlier" else 0.0
        ours, limit = (w * (x - decoded) ** 2).sum(), (w * (x - theirs) ** 2).sum()
        assert ours <= limit * (1 + 1e-6) + rounding, (what, ours, limit)


@every_format
def test_weights_beyond_the_largest_scale_saturate(format):
    x = np.full((1, 256), 1e10, np.float32)
    x[0, ::2] = -3e38
    decoded = decode(format, encode(format, x))
    assert np.isfinite(decoded).all()
    assert (decoded[0, 1::2] > decoded[0, ::2]).all()
    largest = 65504 * (CODES[format.name] - 1) * (15 if format.name == "Q2_K" else 63)
    np.testing.assert_allclose(decode(format, encode(format, np.full((1, 256), 3e38, np.float32))), largest)


@every_format
def test_the_one_weight_that_matters_is_kept(format):
    x, w = specs.gaussian(64, 256), np.zeros(256, np.float32)
    w[37] = 1
    decoded = decode(format, encode(format, x, w))
    np.testing.assert_allclose(decoded[:, 37], x[:, 37], rtol=0, atol=3e-5)


@every_format
def test_codes_for_fixed_scales_are_the_nearest(format):
    x = specs.gaussian(32, 256).T
    scales = jax.jit(format.unpack)(encode(format, x.T).T)[1]
    reconstruct = jax.jit(format.reconstruct)

    def distance(codes: np.ndarray) -> np.ndarray:
        return np.abs(x - np.asarray(reconstruct(codes, scales), np.float64))

    every = [distance(np.full(x.shape, code, np.uint8)) for code in range(CODES[format.name])]
    ours = distance(np.asarray(jax.jit(format.assign)(x, None, scales)))
    np.testing.assert_allclose(ours, np.min(every, axis=0), rtol=1e-5, atol=1e-9)


@every_format
def test_decoding_any_bytes_gives_ggmls_bits(format):
    data = np.random.default_rng(0).integers(0, 256, (BLOCKS, format.block_bytes), dtype=np.uint8)
    where = slice(-4, None) if format.name == "Q2_K" else slice(4)
    specials = np.array([0, 0x8000, 1, 0x3FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00], np.uint16)
    pairs = np.stack(np.meshgrid(specials, specials), axis=-1).reshape(-1, 2)
    data[: len(pairs), where] = np.ascontiguousarray(pairs).view(np.uint8)  # d and dmin
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
    data[[1, 3, -3, -1]] &= 0x3F  # d and dmin finite: a NaN's bits need not survive
    assert (np.asarray(repacked(format)(jnp.asarray(data))) == data).all()


@cache
def repacked(format: Format):
    return jax.jit(lambda data: format.pack(*format.unpack(data)))
