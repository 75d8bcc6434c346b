"""The header of a GGUF file: bytes ↔ metadata and tensor infos. Little endian, versions 2 and 3.

    "GGUF" | version u32 | number of tensors u64 | number of pairs u64
    pair:   key string | type u32 | value            (array: item type u32 | count u64 | items)
    tensor: name string | dims u32 | sizes u64 [dims], innermost first | ggml type u32 | offset u64
    string: length u64 | UTF-8 bytes
    then zeros up to a multiple of general.alignment, then tensors, each at a multiple of it

Offsets count from the first of these multiples. Source: docs/gguf.md of ggml; gguf.cpp of llama.cpp.

gguf.GGUFReader makes an array of every field of every string (2 s for a vocabulary of 49,000); this parser
makes plain values, and checks every length against the bytes that are left before it uses it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jquant.core import GGML_TYPES, MetadataValue, TensorSpec, UserError, block_and_bytes
from jquant.io.paths import AnyPath, read_range

MAGIC = b"GGUF"
_REMOTE_HEADER = 16 << 20  # bytes of a remote file that are read at first
VERSION = 3
ALIGNMENT = 32  # where general.alignment is absent
MAX_DIMS = 4

_BOOL, _STRING, _ARRAY = 7, 8, 9
_DTYPES = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_VALUE_TYPES = {dtype: code for code, dtype in _DTYPES.items()}
_TYPE_NAMES = {number: name for name, number in GGML_TYPES.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# A copied file must keep strings that are not UTF-8, such as halves of characters in old vocabularies.
_TEXT = ("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Header:
    """What the header of one file says. offsets are absolute, in bytes."""

    metadata: dict[str, MetadataValue]
    specs: dict[str, TensorSpec]
    offsets: dict[str, int]


def padded(n: int, alignment: int) -> int:
    """n rounded up to a multiple of alignment."""
    return -(-n // alignment) * alignment


def alignment_of(metadata: Mapping[str, MetadataValue]) -> int:
    """general.alignment, 32 where it is absent. Raises UserError unless it is a power of two."""
    value = metadata.get("general.alignment", np.uint32(ALIGNMENT))
    if not isinstance(value, np.unsignedinteger) or int(value).bit_count() != 1:
        raise UserError(f"general.alignment is {value!r}, which is not a power of two; the file is damaged.")
    return int(value)


class _Cursor:
    """A position in the header that never passes the end of the file."""

    def __init__(self, data: mmap.mmap | bytes, path: AnyPath) -> None:
        self.data = data
        self.path = path
        self.pos = 0

    def need(self, n: int, what: str) -> None:
        left = len(self.data) - self.pos
        if n > left:
            raise UserError(
                f"{self.path}: {what} claims {n} bytes at byte {self.pos}, but the file has only {left} "
                "more: it is truncated or damaged; download or convert it again."
            )

    def u32(self, what: str) -> int:
        self.need(4, what)
        self.pos += 4
        return _U32.unpack_from(self.data, self.pos - 4)[0]

    def u64(self, what: str) -> int:
        self.need(8, what)
        self.pos += 8
        return _U64.unpack_from(self.data, self.pos - 8)[0]

    def take(self, n: int, what: str) -> bytes:
        self.need(n, what)
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def string(self, what: str) -> str:
        return self.take(self.u64(what), what).decode(*_TEXT)

    def strings(self, count: int, what: str) -> list[str]:
        """`string`, count times, checked once: vocabularies are most of a header."""
        self.need(8 * count, what)
        data, pos, unpack, found = self.data, self.pos, _U64.unpack_from, []
        append = found.append
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + unpack(data, pos)[0]
                append(data[start:pos].decode("utf-8", "surrogateescape"))
        except (struct.error, IndexError, OverflowError):
            pass  # the string before claims more than there is
        self.need(pos - self.pos, what)
        self.pos = pos
        return found

    def value(self, key: str) -> MetadataValue:
        what = f"metadata {key!r}"
        code = self.u32(what)
        if code == _STRING:
            return self.string(what)
        if code == _BOOL:
            return self.take(1, what) != b"\0"
        if code == _ARRAY:
            return self.array(key, what)
        dtype = self.dtype(code, what)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0]

    def array(self, key: str, what: str) -> np.ndarray | list[str]:
        code, count = self.u32(what), self.u64(what)
        if code == _STRING:
            return self.strings(count, what)
        if code == _BOOL:
            return np.frombuffer(self.take(count, what), np.uint8) != 0
        dtype = self.dtype(code, what)
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def dtype(self, code: int, what: str) -> np.dtype:
        if code not in _DTYPES:
            raise UserError(
                f"{self.path}: {what} has value type {code}, which GGUF version 3 has not; convert again."
            )
        return _DTYPES[code]

    def tensor(self) -> tuple[TensorSpec, int]:
        """One tensor info and its offset from the start of the data."""
        name = self.string("a tensor's name")
        what = f"the info of tensor {name!r}"
        dims = self.u32(what)
        if dims > MAX_DIMS:
            raise UserError(
                f"{self.path}: tensor {name!r} has {dims} dimensions; GGUF has at most {MAX_DIMS}."
            )
        shape = tuple(self.u64(what) for _ in range(dims))[::-1]
        code, offset = self.u32(what), self.u64(what)
        if code not in _TYPE_NAMES:
            raise UserError(
                f"{self.path}: tensor {name!r} has ggml type {code}, which this gguf package does not know; "
                "upgrade it (pip install -U gguf) if the type is new."
            )
        spec = TensorSpec(name, shape, _TYPE_NAMES[code])
        block, size = block_and_bytes(spec.type)
        if not 0 < math.prod(shape) * size < 1 << 63 or spec.cols % block:
            raise UserError(
                f"{self.path}: tensor {name!r} has shape {shape}, impossible for {spec.type} "
                f"(blocks of {block} weights): the header is damaged; download or convert the file again."
            )
        return spec, offset


def parse(path: AnyPath) -> Header:
    """The header of the file at `path`; no tensor is read.

    Raises UserError where this is no GGUF file of version 2 or 3 in little endian, or where the header or a
    tensor reaches past the end of the file.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != MAGIC:
                raise UserError(
                    f"{path}: not a GGUF file: it begins with {magic!r} rather than {MAGIC!r}; "
                    "give a .gguf file or a folder with safetensors."
                )
            if not isinstance(path, Path):
                return _parse_remote(path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path), len(data))
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror or error}.") from None


def _parse_remote(path: AnyPath) -> Header:
    """How long a header is, it does not say: more and more of the file is read."""
    size, length = path.stat().st_size, _REMOTE_HEADER
    while True:
        data = read_range(path, 0, min(length, size)).tobytes()
        try:
            return _parse(_Cursor(data, path), size)
        except UserError:
            if length >= size:
                raise
        length *= 4


def _parse(cursor: _Cursor, file_size: int) -> Header:
    path = cursor.path
    cursor.pos = len(MAGIC)
    version = cursor.u32("the header")
    if version & 0xFFFF == 0:
        raise UserError(f"{path}: a big-endian GGUF file; convert it to little endian (gguf-convert-endian).")
    if version not in (2, 3):
        raise UserError(
            f"{path}: GGUF version {version}; versions 2 and 3 can be read, so convert the model again."
        )
    tensors, pairs = cursor.u64("the header"), cursor.u64("the header")
    cursor.need(24 * tensors + 13 * pairs, f"a table of {tensors} tensors and {pairs} metadata pairs")

    metadata: dict[str, MetadataValue] = {}
    for _ in range(pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise UserError(
                f"{path}: metadata key {key!r} appears twice; the file is damaged, convert it again."
            )
        metadata[key] = cursor.value(key)

    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    for _ in range(tensors):
        spec, offset = cursor.tensor()
        if spec.name in specs:
            raise UserError(
                f"{path}: tensor {spec.name!r} appears twice; the file is damaged, convert it again."
            )
        specs[spec.name] = spec
        offsets[spec.name] = offset

    try:
        alignment = alignment_of(metadata)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    begin = padded(cursor.pos, alignment)
    for name, offset in offsets.items():
        end = begin + offset + specs[name].nbytes
        if offset % alignment:
            raise UserError(
                f"{path}: tensor {name!r} is at offset {offset}, which is no multiple of {alignment}: "
                "the header is damaged; download or convert the file again."
            )
        if end > file_size:
            raise UserError(
                f"{path}: tensor {name!r} ends at byte {end}, but the file has only {file_size} bytes: "
                "it is truncated; download it again."
            )
        offsets[name] = begin + offset
    return Header(metadata, specs, offsets)


def encode(
    metadata: Mapping[str, MetadataValue], layout: Sequence[TensorSpec]
) -> tuple[bytes, dict[str, int], int]:
    """The header of a file: its bytes up to the first tensor, absolute offsets, and the whole file's size.

    The bytes are those that gguf.GGUFWriter writes for the same pairs and tensors.
    """
    alignment = alignment_of(metadata)
    parts = [MAGIC, _U32.pack(VERSION), _U64.pack(len(layout)), _U64.pack(len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(key, value)]
    relative, end = {}, 0
    for spec in layout:
        parts.append(_tensor(spec, end))
        relative[spec.name] = end
        end = padded(end + spec.nbytes, alignment)
    if len(relative) != len(layout):
        raise ValueError("two tensors of one layout have the same name.")
    data = b"".join(parts)
    data += bytes(padded(len(data), alignment) - len(data))
    return data, {name: len(data) + offset for name, offset in relative.items()}, len(data) + end


def tensor_info_bytes(spec: TensorSpec) -> int:
    """What one tensor adds to a header."""
    return len(_tensor(spec, 0))


def _tensor(spec: TensorSpec, offset: int) -> bytes:
    if spec.type not in GGML_TYPES:
        raise ValueError(
            f"{spec.name}: GGUF has no type {spec.type}; convert the tensor, for instance to F16."
        )
    if len(spec.shape) > MAX_DIMS:
        raise ValueError(f"{spec.name}: GGUF has at most {MAX_DIMS} dimensions; got shape {spec.shape}.")
    dims = struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
    code = GGML_TYPES[spec.type]
    return _string(spec.name) + dims + struct.pack("<IQ", code, offset)


def _string(text: str) -> bytes:
    data = text.encode(*_TEXT)
    return _U64.pack(len(data)) + data


def _value(key: str, value: MetadataValue) -> bytes:
    """Type and value. NumPy's types choose GGUF's."""
    if isinstance(value, bool | np.bool_):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, str):
        return _U32.pack(_STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    if value.ndim <= 1 and value.dtype == np.bool_:
        return struct.pack("<IIQ", _ARRAY, _BOOL, value.size) + value.tobytes()
    dtype = value.dtype.newbyteorder("<")
    if value.ndim > 1 or dtype not in _VALUE_TYPES:
        raise ValueError(f"metadata {key!r}: GGUF has no type for {value.dtype} of shape {value.shape}.")
    data, code = value.astype(dtype).tobytes(), _VALUE_TYPES[dtype]
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, code, value.size) + data
    return _U32.pack(code) + data
