"""A model on disk as tensors to compute with: whatever type, scheme or layout they are stored in."""

from jquant.checkpoints._transcode import LOW_BPW, slab_rows, transcode
from jquant.core import FLOAT_DTYPES

__all__ = [
    "FLOAT_DTYPES",
    "LOW_BPW",
    "slab_rows",
    "transcode",
]
