"""Statistics of a model's inputs in one safetensors file: what `jquant analyze --method hessian` writes.

Tensors: TENSOR.KEY, such as blk.0.attn_k.weight.xtx F32 [cols, cols], or [experts, cols, cols] for a stack,
and TENSOR.count I32 [] or [experts], how many tokens the sums have. Matrices with the same input share what
is stored under the name of the first of them.

__metadata__, strings: jquant.statistics, the version of this form, "1"; method; model; dataset; sha256 of the
text; samples; sequence_length; jquant, the version that wrote it; shared, JSON: name of a tensor → the tensor
whose statistics it has too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jquant.core import TensorSpec, UserError, block_and_bytes
from jquant.io._rows import read_rows
from jquant.io.gguf_sink import check_target
from jquant.io.safetensors import parse
from jquant.io.space import reserve
from jquant.io.write_errors import reporting

_FORM, _VERSION = "jquant.statistics", "1"
DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4")}
TYPES = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32"}


class StatisticsSink:
    """Writes `path`: first everything to `path`.partial, which `commit` syncs and renames.

    Use it as a context: what is not committed at its end is deleted.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        layout: Sequence[TensorSpec],
        shared: Mapping[str, str],
        *,
        force: bool = False,
    ) -> None:
        """layout: of tensors TENSOR.KEY, types F32 and I32. shared: see the head of this file.

        Raises OutputError where the output exists (unless `force`), cannot be written or finds no space.
        """
        check_target(path, force=force)
        self.path, self._partial = path, path.with_name(path.name + ".partial")
        header: dict[str, object] = {
            "__metadata__": {_FORM: _VERSION, **metadata, "shared": json.dumps(dict(shared))}
        }
        end, self._where = 0, {}
        for spec in layout:
            self._where[spec.name] = end, spec
            size = spec.size * block_and_bytes(spec.type)[1]
            entry = {"dtype": spec.type, "shape": list(spec.shape), "data_offsets": [end, end + size]}
            header[spec.name], end = entry, end + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
        self._data, self._missing = 8 + len(text), set(self._where)
        with reporting(self._partial):
            self._file = self._partial.open("wb")
            try:
                reserve(self._file, self._data + end)
                self._file.write(len(text).to_bytes(8, "little") + text)
            except OSError:
                self.close()
                raise

    def __enter__(self) -> StatisticsSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, name: str, array: np.ndarray) -> None:
        """A whole tensor of the layout. ValueError where it has another shape or type."""
        offset, spec = self._where[name]
        if array.shape != spec.shape or TYPES.get(array.dtype) != spec.type:
            raise ValueError(f"{name}: has shape {array.shape} of {array.dtype}; the layout says {spec}.")
        with reporting(self._partial):
            self._file.seek(self._data + offset)
            self._file.write(np.ascontiguousarray(array, DTYPES[spec.type]).data)
        self._missing.discard(name)

    def commit(self) -> None:
        """Make the file appear under its final name. ValueError where a tensor was not written."""
        if self._missing:
            raise ValueError(f"{self.path}: {min(self._missing)} was not written.")
        with reporting(self._partial):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.path)

    def close(self) -> None:
        """Delete what is not committed."""
        if not self._file.closed:
            self._file.close()
            self._partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Statistics:
    """A file to read: headers at once, arrays when asked."""

    path: Path
    metadata: Mapping[str, str]
    keys: Mapping[
        str, tuple[str, ...]
    ]  # of each tensor of the model, in the order of the file: ("xtx", "count")
    _specs: Mapping[str, TensorSpec]
    _offsets: Mapping[str, int]
    _shared: Mapping[str, str]

    @property
    def method(self) -> str:
        return self.metadata["method"]

    def read(self, tensor: str) -> dict[str, np.ndarray]:
        """What is known of the input of a tensor, by key. A KeyError: no such tensor."""
        return {key: self.array(tensor, key) for key in self.keys[tensor]}

    def array(self, tensor: str, key: str) -> np.ndarray:
        """One array: float32 or int32, of the shape that the head of this file gives."""
        name = f"{self._shared.get(tensor, tensor)}.{key}"
        spec = self._specs[name]
        data = read_rows(self.path, self._offsets[name], spec, 0, None)
        return np.frombuffer(data.tobytes(), DTYPES[spec.type]).reshape(spec.shape)


def open_statistics(path: Path) -> Statistics:
    """Read the header. Raises UserError where the file is of another kind, or damaged."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror}.") from None
    if magic == b"GGUF":
        raise UserError(
            f"{path}: is a GGUF file; statistics are what jquant analyze --method hessian writes."
        )
    found = parse(path)
    form = found.metadata.get(_FORM)
    if form is None:
        raise UserError(
            f"{path}: is a safetensors file of something else; statistics are what jquant analyze --method "
            "hessian writes."
        )
    if form != _VERSION:
        raise UserError(f"{path}: has form {form} of statistics, known is {_VERSION}; upgrade jquant.")
    try:
        shared = {str(name): str(first) for name, first in json.loads(found.metadata["shared"]).items()}
        _ = found.metadata["method"]
    except (KeyError, ValueError, AttributeError):
        raise UserError(f"{path}: its metadata lack the method or what is shared; make it again.") from None
    stored: dict[str, tuple[str, ...]] = {}
    for name, spec in found.specs.items():
        tensor, _, key = name.rpartition(".")
        if spec.type not in DTYPES:
            raise UserError(f"{path}: {name} has type {spec.type}, expected F32 or I32; make it again.")
        stored[tensor] = (*stored.get(tensor, ()), key)
    for name, first in shared.items():
        if first not in stored:
            raise UserError(f"{path}: {name} should share {first}, which is not there; make it again.")
    keys = stored | {name: stored[first] for name, first in shared.items()}
    return Statistics(path, found.metadata, keys, found.specs, found.offsets, shared)
