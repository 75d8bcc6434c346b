"""F32, F16, BF16 are written as ggml writes them; these and the 8-bit floats are read to the bit."""

from __future__ import annotations

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import specs
from helpers import ggml

from jquant.core import QuantizedTensor, dequantize, quantize
from jquant.formats import FORMATS

WRITTEN = [FORMATS[name] for name in ("F32", "F16", "BF16")]
DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def encode(format, x: np.ndarray) -> np.ndarray:
    return np.asarray(quantize(jnp.asarray(x), format).parts["blocks"])


def edges() -> np.ndarray:
    """float32 [1, n]: every exponent and sign, with the mantissas at which float16 and bfloat16 round."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (high[:, None] | low).reshape(1, -1).view(np.float32)
    return x[~np.isnan(x)][None]


@pytest.mark.parametrize("format", WRITTEN, ids=str)
def test_every_rounding_equals_cs(format):
    x = edges()
    theirs = ggml.encode(format.ggml_type, x)
    assert (encode(format, x) == theirs).all()


@pytest.mark.parametrize("format", WRITTEN, ids=str)
@pytest.mark.parametrize("distribution", specs.DISTRIBUTIONS.values(), ids=specs.DISTRIBUTIONS)
def test_random_weights_equal_cs_and_gguf_pys(format, distribution):
    x = distribution(64, 1024)
    ours = encode(format, x)
    assert (ours == ggml.encode(format.ggml_type, x)).all()
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType(format.ggml_type))
    assert (ours == theirs.view(np.uint8).reshape(ours.shape)).all()


@pytest.mark.parametrize("format", WRITTEN, ids=str)
def test_no_number_stays_no_number(format):
    x = np.array([[np.nan, -np.nan, np.inf, -np.inf]], np.float32)
    decoded = np.asarray(dequantize(quantize(jnp.asarray(x), format)))
    assert np.isnan(decoded[0, :2]).all()
    assert (decoded[0, 2:] == [np.inf, -np.inf]).all()


@pytest.mark.parametrize("name", DTYPES)
def test_every_stored_value_is_read_as_numpy_reads_it(name):
    size = np.dtype(DTYPES[name]).itemsize
    if size == 4:
        data = np.random.default_rng(0).integers(0, 256, (1, 1 << 18), dtype=np.uint8)
    else:
        data = np.arange(1 << 8 * size, dtype=f"<u{size}").view(np.uint8)[None]
    ours = np.asarray(dequantize(QuantizedTensor({"blocks": jnp.asarray(data)}, FORMATS[name])))
    theirs = data.view(DTYPES[name]).astype(np.float32)
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), data.reshape(-1, size)[~same[0]][:5]
