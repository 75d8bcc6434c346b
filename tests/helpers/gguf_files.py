"""GGUF files as gguf-py reads and writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from helpers.commands import printed


def tensors(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(str(file)).tensors}


def imatrix_file(path: Path, model: Path, prefix: str = "blk.0.") -> Path:
    """An imatrix of every matrix of the model's first block (or of others), from random activations."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["made up"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    file = path.with_suffix(".f16")
    printed("quantize", model, file, "--type", "F16", "-q")
    for name, tensor in tensors(file).items():
        if name.startswith(prefix) and len(tensor.shape) == 2:
            sums = rng.chisquare(4, (1, tensor.shape[0])).astype(np.float32)
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", np.full((1, 1), 512, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
