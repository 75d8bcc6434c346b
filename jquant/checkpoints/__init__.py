"""A model on disk as tensors to compute with: whatever type, scheme or layout they are stored in."""

from jquant.checkpoints._transcode import LOW_BPW, loop_over, slab_rows, slab_steps, transcode
from jquant.checkpoints.model import AnyModel, Model, open_model, opened
from jquant.core import FLOAT_DTYPES

__all__ = [
    "FLOAT_DTYPES",
    "LOW_BPW",
    "AnyModel",
    "Model",
    "loop_over",
    "open_model",
    "opened",
    "slab_rows",
    "slab_steps",
    "transcode",
]
