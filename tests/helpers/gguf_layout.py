"""A small file to write: its metadata, its tensors, and the run that writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jquant import io
from jquant.core import TensorSpec

METADATA = {"general.architecture": "llama", "general.name": "x" * 50, "tokens": ["a", "b"]}
LAYOUT = [
    TensorSpec("embedding", (40, 64), "Q8_0"),
    TensorSpec("norm", (33,), "F32"),
    TensorSpec("experts", (3, 5, 256), "Q4_K"),
    TensorSpec("output", (40, 64), "F16"),
]
ROWS = {
    s.name: np.random.default_rng(i).integers(0, 256, (s.rows, s.row_bytes), np.uint8)
    for i, s in enumerate(LAYOUT)
}


def put(sink: io.GgufSink, *names: str) -> None:
    for name in names:
        sink.write(name, 0, ROWS[name])
        sink.finish(name)


def write(path: Path, **options) -> io.GgufSink:
    """An undisturbed run, or the rest of a disturbed one."""
    with io.GgufSink(path, METADATA, LAYOUT, **options) as sink:
        put(sink, *[s.name for s in LAYOUT if s.name not in sink.finished()])
        sink.commit()
    return sink
