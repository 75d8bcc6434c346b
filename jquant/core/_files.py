"""What model files are made of: TensorSpec and Metadata; Source, Writer, Sink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import gguf
import ml_dtypes
import numpy as np

from jquant.core._errors import UserError

# A typed value of a GGUF header. NumPy's types tell UINT32 from INT32 and FLOAT32 from FLOAT64, so a value
# that is read and written again keeps its type: np.uint32(32), np.float32(1e-5), an array of np.int32.
MetadataValue = str | bool | np.generic | np.ndarray | list[str]
Metadata = Mapping[str, MetadataValue]

# ggml's types: name → number in a GGUF header. gguf-py lags behind llama.cpp for the newest one.
GGML_TYPES = {t.name: t.value for t in gguf.GGMLQuantizationType} | {"Q2_0": 42}
# Weights and bytes of one block of each stored type.
_BLOCKS: dict[str, tuple[int, int]] = {t.name: size for t, size in gguf.GGML_QUANT_SIZES.items()}
_BLOCKS |= {"Q2_0": (64, 18)}
_ONLY_SAFETENSORS = {"BOOL": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8}
_ONLY_SAFETENSORS |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_BLOCKS |= {name: (1, size) for name, size in _ONLY_SAFETENSORS.items()}

# Stored types that are floats. In TRAINED ones models are trained and published, and scales stored.
FLOAT_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
TRAINED = ("F32", "F16", "BF16")


def block_and_bytes(type: str) -> tuple[int, int]:
    """Weights and bytes of one block of a stored type, as the file formats define them."""
    if type not in _BLOCKS:
        raise UserError(f"unknown tensor type {type!r}; upgrade the gguf package if it is new.")
    return _BLOCKS[type]


def bits_per_weight(type: str) -> float:
    block, size = block_and_bytes(type)
    return 8 * size / block


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor. shape is in NumPy order: (rows…, columns); GGUF's is the reverse."""

    name: str
    shape: tuple[int, ...]
    type: str  # a key of FORMATS ("F16", "Q4_K", "F8_E4M3"), or a type that is only copied ("I32")

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix; a vector or a scalar has one."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def size(self) -> int:
        return self.rows * self.cols

    @property
    def row_bytes(self) -> int:
        block, size = block_and_bytes(self.type)
        return self.cols // block * size

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class Rows(NamedTuple):
    """Rows [start, stop) of a tensor seen as a matrix."""

    name: str
    start: int
    stop: int


@runtime_checkable
class Source(Protocol):
    """A model to read: headers at once, rows when asked.

    `read` returns rows [start, stop) of the tensor seen as a matrix, as stored bytes, uint8
    [stop − start, row bytes]. It may be called from several threads.
    """

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...


@runtime_checkable
class Writer(Protocol):
    """Takes the tensors of a file whose layout is known from the start. `write` may be called from several
    threads."""

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Put rows (uint8 [k, row bytes]) of a tensor at row `start`."""
        ...

    def finish(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Rows [start, stop) of this tensor, by default all, are written: remember it for a resumed run."""
        ...


@runtime_checkable
class Sink(Writer, Protocol):
    """A file to write."""

    def commit(self) -> None:
        """Make the file appear under its final name."""
        ...

    def close(self) -> None:
        """Release the file without committing; what was written stays for a resumed run."""
        ...
