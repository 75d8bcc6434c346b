"""The peers that benchmarks run beside us, taken from where the tests have them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.llama_quantize import params, write

from jquant.io import imatrix as imatrix_file
from jquant.plan import FILE_TYPES


def llama_quantize(model: Path, out: Path, kind: str, threads: int, imatrix: Path | None = None) -> None:
    """llama.cpp's quantizer on a GGUF file."""
    importance = None
    if imatrix is not None:
        importance = {name: values.reshape(-1) for name, values in imatrix_file.read(imatrix).entries.items()}
    settings = params(FILE_TYPES[kind].number, importance=importance)
    settings.nthread = threads
    write(model, out, settings)
