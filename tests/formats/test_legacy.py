"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: ggml's bytes without importance, less error with it, ggml's bits decoded."""

from __future__ import annotations

from functools import cache

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from helpers import ggml, tables
from helpers.places import if_shared
from helpers.real_weights import SMOLLM2

from jquant.core import Format, QuantizedTensor, dequantize, quantize
from jquant.formats import FORMATS

FORMATS_HERE = [FORMATS[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]
every_format = pytest.mark.parametrize("format", tables.formats(map(str, FORMATS_HERE), {"Q4_0"}))
STORIES = "data/models/stories15M/model.safetensors"


def padded(x: np.ndarray) -> np.ndarray:
    """x with zeros up to 2¹⁵ rows, for then each format is compiled once for all tests."""
    return np.concatenate([x, np.zeros((max((1 << 15) - len(x), 0), x.shape[1]), x.dtype)])


def encode(format: Format, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """x [..., cols], importance [cols]: uint8 [blocks, block bytes]."""
    blocks = x.reshape(-1, 32)
    w = None
    if importance is not None:
        w = jnp.asarray(padded(np.broadcast_to(importance, x.shape).reshape(-1, 32)))
    encoded = quantize(jnp.asarray(padded(blocks)), format, w)
    return np.asarray(encoded.parts["blocks"])[: len(blocks)]


def decode(format: Format, data: np.ndarray) -> np.ndarray:
    """uint8 [blocks, block bytes] → float32 [blocks, 32]."""
    return np.asarray(dequantize(QuantizedTensor({"blocks": jnp.asarray(padded(data))}, format)))[: len(data)]


def assert_ggml_bytes(format: Format, x: np.ndarray, what: str) -> None:
    """x [rows, cols]: our bytes are C's; the first block that differs is shown."""
    blocks = x.reshape(-1, 32)
    ours, theirs = encode(format, x), ggml.encode(format.ggml_type, blocks)
    differs = (ours != theirs).any(axis=1)
    if differs.any():
        i = int(differs.argmax())
        pytest.fail(
            f"{what}: {differs.sum()} of {len(blocks)} blocks differ; block {i}: {blocks[i].tolist()}\n"
            f"ours   {ours[i].tolist()}\ntheirs {theirs[i].tolist()}"
        )


def errors(format: Format, data: np.ndarray, x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Σ w (x − x̂)² of each block of 32, float64, of what ggml decodes."""
    y = ggml.decode(format.ggml_type, data).astype(np.float64).reshape(x.shape)
    return (importance * (x - y) ** 2).reshape(-1, 32).sum(axis=1)


@cache
def real_tensors() -> dict[str, np.ndarray]:
    """Parts of trained tensors, float32."""
    chosen = ("token_embd", "blk.7.attn_q", "blk.7.ffn_down")
    found = {name: x for name, x in specs.gguf_matrices(SMOLLM2, 1 << 15) if name.startswith(chosen)}
    if stories := if_shared(STORIES):
        found |= {name: x for name, x in specs.safetensors_matrices(stories, 1 << 15) if "layers.3." in name}
    return found


@every_format
def test_bytes_at_the_edges_equal_cs(format):
    for what, blocks in specs.edge_blocks().items():
        assert_ggml_bytes(format, blocks, what)


@every_format
@pytest.mark.parametrize("distribution", specs.DISTRIBUTIONS.values(), ids=specs.DISTRIBUTIONS)
def test_bytes_of_random_weights_equal_cs(format, distribution):
    assert_ggml_bytes(format, distribution(256, 1024), format.name)


@every_format
def test_bytes_of_trained_tensors_equal_cs(format):
    for name, x in real_tensors().items():
        assert_ggml_bytes(format, x, name)


@every_format
def test_bytes_of_trained_tensors_of_another_model_equal_cs(format, shared):
    for name, x in specs.safetensors_matrices(shared(STORIES), 1 << 17):
        assert_ggml_bytes(format, x, name)


@every_format
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_spoils_its_own_block_only(format, value):
    x = specs.gaussian(8, 96)
    spoilt = x.copy()
    spoilt[3, 40] = value
    for importance in (None, specs.importance(96)):
        differs = (encode(format, x, importance) != encode(format, spoilt, importance)).reshape(8, 3, -1)
        assert set(map(tuple, np.argwhere(differs.any(axis=-1)))) <= {(3, 1)}


@every_format
def test_decoding_any_bytes_gives_ggmls_bits(format):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (1 << 16, format.block_bytes), dtype=np.uint8)
    data[:, :2] = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)  # every d
    ours = decode(format, data)
    peers = {"ggml": ggml.decode(format.ggml_type, data)}
    with np.errstate(invalid="ignore", over="ignore"):
        peers["gguf-py"] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(format.ggml_type))
    for peer, theirs in peers.items():
        same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
        assert same.all(), (peer, np.argwhere(~same)[:3])


@every_format
def test_packing_is_the_inverse_of_unpacking(format):
    data = np.random.default_rng(0).integers(0, 256, (format.block_bytes, 1000), dtype=np.uint8)
    data[[1, 3]] &= 0x3F  # d and m finite: a NaN's bits need not survive
    again = jax.jit(lambda data: format.pack(*format.unpack(data)))(data)
    assert (np.asarray(again) == data).all()


WEIGHED = {name: make(64, 1024) for name, make in specs.DISTRIBUTIONS.items()}


@every_format
def test_importance_never_costs_a_block(format):
    """Block by block, the weighted error is at most that of the encoder without importance."""
    for name, x in (WEIGHED | real_tensors()).items():
        w = specs.importance(x.shape[1])
        with_it = errors(format, encode(format, x, w), x, w)
        without = errors(format, encode(format, x), x, w)
        assert (with_it <= without * (1 + 1e-5) + 1e-30).all(), name


@every_format
def test_the_weighted_error_is_below_ggmls(format):
    for name, x in (WEIGHED | real_tensors()).items():
        w = specs.importance(x.shape[1])
        ours = errors(format, encode(format, x, w), x, w).sum()
        theirs = errors(format, ggml.encode(format.ggml_type, x, w), x, w).sum()
        # Weights that were in such a type before have no error to lower; 1e-6 is far below either type's.
        assert ours < max(0.995 * theirs, 1e-6 * (w * np.square(x, dtype=np.float64)).sum()), name


def test_weights_that_lie_on_a_grid_of_fewer_steps_stay_on_it():
    """As weights decoded from Q5_0 do; one of them matters far more than the others."""
    rng = np.random.default_rng(0)
    format, importance = FORMATS["Q5_1"], np.full(32, 0.01, np.float32)
    importance[23] = 60
    q = rng.integers(1, 30, (512, 32))
    q[:, 3], q[:, 9] = 0, 30
    d = np.float32(np.float16(rng.uniform(0.02, 0.06, (512, 1))))
    x = (q * d - np.float32(np.float16(15 * d))).astype(np.float32)
    ours = errors(format, encode(format, x, importance), x, importance)
    theirs = errors(format, ggml.encode(format.ggml_type, x, importance), x, importance)
    assert np.all(ours <= theirs + 1e-9)


@every_format
def test_the_size_of_importance_does_not_matter(format):
    x, w = specs.gaussian(16, 256), specs.importance(256)
    reference = encode(format, x, w)
    for scale in (2.0**-100, 2.0**100):
        assert (encode(format, x, w * np.float32(scale)) == reference).all()


@every_format
def test_without_any_importance_in_a_block_all_weights_count_alike(format):
    x = specs.gaussian(16, 256)
    nothing, alike = np.zeros(256, np.float32), np.ones(256, np.float32)
    assert (encode(format, x, nothing) == encode(format, x, alike)).all()


@every_format
def test_importance_keeps_scales_finite_and_zeros_zero(format):
    for what, x in specs.edge_blocks().items():
        decoded = decode(format, encode(format, x, specs.importance(32)))
        assert np.isfinite(decoded).all(), what
        assert (decoded[(x == 0).all(axis=1)] == 0).all(), what
