"""Models with channels that 8 bits cannot hold, and samples that show them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from helpers.tiny_models import LINES, open_tiny
from jquant.calibration import load_samples
from jquant.checkpoints.model import Model
from jquant.text.samples import Samples, Text

TOKENS = np.random.default_rng(7).integers(3, 350, (3, 40)).astype(np.int32)
NORMS = ("input_layernorm", "post_attention_layernorm")


def calibration(model: Model) -> Samples:
    return load_samples(model, Text("lines", "\n".join(LINES * 12).encode()), samples=6, sequence_length=48)


def with_outliers(folder: Path, factor: float = 100.0, channels: slice = slice(3, 6)) -> Path:
    """The same function, with inputs that 8 bits cannot hold."""
    tensors = open_tiny(folder).tensors
    for name, tensor in tensors.items():
        if name.split(".")[-2] in NORMS:
            tensor[channels] *= factor
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            tensor[:, channels] /= factor
    save_file(tensors, folder / "model.safetensors")
    return folder
