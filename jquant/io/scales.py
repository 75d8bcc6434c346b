"""Scales of a model in one safetensors file, for other tools: float32 tensors by the names of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jquant.io.gguf_sink import check_target
from jquant.io.write_errors import reporting


def write(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, force: bool = False
) -> None:
    """First to `path`.partial, then under its name.

    Raises OutputError where the output exists (unless `force`) or cannot be written.
    """
    check_target(path, force=force)
    partial = path.with_name(path.name + ".partial")
    try:
        with reporting(path):
            save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, partial, dict(metadata))
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
