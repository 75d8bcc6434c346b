"""llama.cpp's own quantizer: the oracle for plans, and sparse GGUF files of any size to ask it about.

A dry run tells the type of every tensor in the log and reads no weight, so a model costs a header.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from jquant.core import GGML_TYPES, Metadata, TensorSpec

_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- .*? type = +(\S+), size = .*? MiB(?: -> .*?MiB \((\S+)\))?\n")
_TYPE_NAMES = {name.lower(): name for name in GGML_TYPES}
_log: list[str] = []


@llama_cpp.llama_log_callback
def _collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    _log.append(text.decode())


def write_sparse(path: Path, specs: Sequence[TensorSpec], metadata: Metadata) -> None:
    """A GGUF file whose header is real and whose weights are a hole in the disk."""
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, np.ndarray):
            writer.add_array(key, value.tolist())
        elif isinstance(value, np.floating):
            writer.add_float32(key, float(value))
        elif isinstance(value, np.integer):
            writer.add_uint32(key, int(value))
    for spec in specs:
        raw = gguf.GGMLQuantizationType[spec.type]
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.nbytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + sum(-(-spec.nbytes // 32) * 32 for spec in specs) + 32)


def params(
    file_type: int,
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    pure: bool = False,
    output_type: str | None = None,
    embedding_type: str | None = None,
    rules: Sequence[tuple[str, str]] = (),
) -> llama_cpp.llama_model_quantize_params:
    """llama_model_quantize's parameters; importance: float32 per tensor, as an imatrix file gives it."""
    made = llama_cpp.llama_model_quantize_default_params()
    made.nthread = 1
    made.ftype = file_type
    made.pure = pure
    if output_type:
        made.output_tensor_type = gguf.GGMLQuantizationType[output_type]
    if embedding_type:
        made.token_embedding_type = gguf.GGMLQuantizationType[embedding_type]
    if importance is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        made.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    if rules:
        overrides = (llama_cpp.llama_model_tensor_override * (len(rules) + 1))()
        for override, (pattern, type) in zip(overrides, rules, strict=False):
            override.pattern = pattern.encode()
            override.type = gguf.GGMLQuantizationType[type]
        made.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    return made


def dry_run(path: Path, params: llama_cpp.llama_model_quantize_params) -> dict[str, str]:
    """The tensor type that llama.cpp would give each tensor of the file."""
    lines = _LINE.findall(dry_run_log(path, params))
    return {name: _TYPE_NAMES[(new or old).lower()] for name, old, new in lines}


def dry_run_log(path: Path, params: llama_cpp.llama_model_quantize_params) -> str:
    params.dry_run = True
    return _quantize(path, path, params)


def write(path: Path, out: Path, params: llama_cpp.llama_model_quantize_params) -> dict[str, str]:
    """Quantize for real; the tensor types that are in the file."""
    _quantize(path, out, params)
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}


def _quantize(path: Path, out: Path, params: llama_cpp.llama_model_quantize_params) -> str:
    """Run, and return the log."""
    _log.clear()
    llama_cpp.llama_log_set(_collect, ctypes.c_void_p(0))
    try:
        failed = llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(params))
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
    text = "".join(_log)
    assert not failed, text[-400:]
    return text
