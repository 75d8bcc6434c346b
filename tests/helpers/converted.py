"""Tiny models as GGUF files in float32, and what llama.cpp computes from them."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp
import numpy as np

from helpers.tiny_models import open_tiny, write_gguf
from jquant import models
from jquant.text import tokenizer


def convert(folder: Path, path: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    architecture = models.for_config(config)
    header = architecture.metadata(config, folder.name) | tokenizer.metadata(folder, config)
    return write_gguf(path, header, architecture.as_gguf(open_tiny(folder), config))


def llama_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """[tokens, vocab], with a float32 cache so that only sums differ from the reference."""
    model = llama_cpp.Llama(
        str(path), verbose=False, logits_all=True, n_ctx=128, n_threads=1, type_k=0, type_v=0
    )
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])
