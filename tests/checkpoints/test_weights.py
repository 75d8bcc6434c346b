"""Weights as float32, judged by the gguf package's decoders."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from jquant.checkpoints.weights import Weights
from jquant.core import TensorSpec, UserError

ROWS, COLS = 6, 256


class Stored:
    """One tensor of any type."""

    def __init__(self, type: str, data: np.ndarray):
        self.specs = {"w": TensorSpec("w", (2, ROWS // 2, COLS), type)}
        self._data = data

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._data[start:stop]


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "IQ2_XXS", "TQ1_0", "MXFP4"])
def test_weights_are_what_a_runtime_decodes(type):
    kind = gguf.GGMLQuantizationType[type]
    rng = np.random.default_rng(0)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if block == 1:
        data = gguf.quants.quantize(rng.normal(size=(ROWS, COLS)).astype(np.float32), kind)
        data = np.ascontiguousarray(data).view(np.uint8).reshape(ROWS, -1)
    else:
        data = rng.integers(0, 60, (ROWS, COLS // block * nbytes), np.uint8)  # scales stay finite
    stored = data.view({"F32": np.float32, "F16": np.float16}.get(type, np.uint8))
    wanted = gguf.quants.dequantize(stored, kind).reshape(ROWS, COLS)
    weights = Weights(Stored(type, data))
    np.testing.assert_array_equal(weights.rows("w", 2, 5), wanted[2:5])
    np.testing.assert_array_equal(weights.tensor("w"), wanted.reshape(2, ROWS // 2, COLS))


def test_what_holds_no_weights_is_refused():
    with pytest.raises(UserError, match="w: has type I32, which holds no weights"):
        Weights(Stored("I32", np.zeros((ROWS, 4 * COLS), np.uint8))).tensor("w")
