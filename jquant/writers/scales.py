"""What quantizing a folder found, beside it: `jquant quantize --export-scales`.

By the names of the folder's modules, all float32:

    X.weight_scale  [rows, groups], one group where a row has one scale: w ≈ s q
    X.smoothing     [cols]: each input is divided by it, each column of the weight multiplied
    X.input_absmax  [cols]: the largest magnitude of each input on the samples, before smoothing
    X.input_scale   [1]: of all inputs, where it is static
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike

from jquant.checkpoints import FLOAT_DTYPES
from jquant.io import SafetensorsSource
from jquant.writers.folder_plan import Checkpoint, FolderPlan
from jquant.writers.w8a8 import Calibrated


def scales_of(
    checkpoint: Checkpoint, plan: FolderPlan, folder: Path, calibrated: Calibrated | None
) -> dict[str, np.ndarray]:
    """The tensors. folder: as it was written. calibrated: where inputs were measured."""
    source = SafetensorsSource(folder)

    def stored(name: str) -> np.ndarray:
        return source.read(name).view(FLOAT_DTYPES[source.specs[name].type]).astype(np.float32)

    found = {}
    for name in plan.quantized:
        module = name.removesuffix(".weight")
        if plan.scheme.transposed is None:
            found[f"{module}.weight_scale"] = stored(f"{module}.weight_scale")
        else:
            found[f"{module}.weight_scale"] = stored(f"{module}.scales").T
        if plan.scheme.static:
            found[f"{module}.input_scale"] = stored(f"{module}.input_scale")[0]
    if calibrated is not None:
        cols = {f"{name}.weight": f.cols for name, f in calibrated.factors.items() if f.cols is not None}
        largest = {name: stats["absmax"] for name, stats in calibrated.stats.items()}
        for kind, rows in (("smoothing", cols), ("input_absmax", largest)):
            for part, row in _by_part(checkpoint, rows):
                found[f"{part.removesuffix('.weight')}.{kind}"] = row
    return found


def _by_part(checkpoint: Checkpoint, rows: Mapping[str, ArrayLike]) -> Iterator[tuple[str, np.ndarray]]:
    """Weights of the checkpoint and their rows [cols], of [cols] or [experts, cols] by GGUF name."""
    for name, given in rows.items():
        values = np.asarray(given, np.float32)
        for i, part in enumerate(checkpoint.weights[name].parts):
            yield part, values[i] if values.ndim > 1 else values
