"""SafetensorsSource: a Hugging Face checkpoint to read, one file or shards with an index.

    length of the header u64, little endian | header: JSON | tensors, one after the other
    header: {"name": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [begin, end]}, …}

Offsets count from the end of the header. Source: the format section of the safetensors README. The
safetensors package gives whole arrays of a framework; quantizing needs the stored bytes of a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jquant.core import TensorSpec, UserError, block_and_bytes, parse_json
from jquant.io._rows import read_rows
from jquant.io.paths import AnyPath

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # bytes; the safetensors package's own limit
_TORCH = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class File:
    path: AnyPath
    specs: dict[str, TensorSpec]
    offsets: dict[str, int]  # absolute, in bytes
    metadata: dict[str, str]


class SafetensorsSource:
    """A folder with model.safetensors, or with shards and model.safetensors.index.json; or one file of these.

    A shard that an index beside it lists opens the whole model. `specs` are in the order of the shards and
    of the data in them. `read` may be called from several threads.
    """

    def __init__(self, path: AnyPath) -> None:
        """Reads headers only. Raises UserError where one is not sound, or a file or a tensor is missing."""
        self.path = path
        self.files, index, self.remarks = _files(path)
        files = [parse(p) for p in self.files]
        self._specs: dict[str, TensorSpec] = {}
        self._where: dict[str, tuple[AnyPath, int]] = {}
        for file in files:
            for name, spec in file.specs.items():
                # Where two shards have a tensor, the index says which one counts.
                if index.get(name, file.path.name) != file.path.name:
                    continue
                if name in self._specs:
                    raise UserError(
                        f"{file.path}: {name} is also in {self._where[name][0].name}; keep one of them."
                    )
                self._specs[name] = spec
                self._where[name] = file.path, file.offsets[name]
        for name, shard in index.items():
            if name not in self._specs:
                raise UserError(
                    f"{path}: {INDEX} says that {name} is in {shard}, but it is not; download {shard} again."
                )

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return MappingProxyType(self._specs)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "k b"]:
        """Rows [start, stop) of a tensor as stored bytes. A KeyError: no such tensor."""
        return read_rows(*self._where[name], self._specs[name], start, stop)


def _files(path: AnyPath) -> tuple[list[AnyPath], dict[str, str], tuple[str, ...]]:
    """Files of the model, the index (name of a tensor → name of its file; empty without one), and what the
    user should know. In a folder model.safetensors comes first, as transformers has it."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a folder with {SINGLE} or {INDEX}.")
    folder = path if path.is_dir() else path.parent
    index_path = path if path.name.endswith(".index.json") else folder / INDEX
    if path.is_dir() and (path / SINGLE).is_file():
        remark = f"{path}: {SINGLE} is read, as transformers does; {INDEX} beside it is passed over."
        return [path / SINGLE], {}, (remark,) if _names_others(index_path) else ()
    if index_path.is_file():
        index = _read_index(index_path)
        names = sorted(set(index.values()))
        if path.is_dir() or path == index_path or path.name in names:
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(
                    f"{index_path}: {len(missing)} of {len(names)} shards are missing, the first is "
                    f"{missing[0]}; download it."
                )
            return [folder / name for name in names], index, ()
    if not path.is_dir():
        return [path], {}, ()
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}, ()
    if found:
        raise UserError(
            f"{path}: has {len(found)} safetensors files but no {INDEX}; download it, or give one file."
        )
    torch_files = sorted(p.name for pattern in _TORCH for p in path.glob(pattern))
    if torch_files:
        raise UserError(
            f"{path}: has {torch_files[0]} but no safetensors; jquant runs no pickles, so convert it first "
            "(transformers: model.save_pretrained(folder, safe_serialization=True))."
        )
    raise UserError(f"{path}: no safetensors here; expected {SINGLE}, or {INDEX} and its shards.")


def _names_others(index_path: AnyPath) -> bool:
    """Whether an index lies there that is not just of model.safetensors."""
    if not index_path.is_file():
        return False
    try:
        return set(_read_index(index_path).values()) != {SINGLE}
    except UserError:
        return True


def _read_index(path: AnyPath) -> dict[str, str]:
    try:
        told = parse_json(path.read_bytes())
        index = told["weight_map"] if isinstance(told, dict) else None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: not an index of safetensors (no weight_map in JSON); download it again."
        ) from None
    if not isinstance(index, dict) or not all(map(_names_a_file, index.values())):
        raise UserError(
            f"{path}: weight_map must map tensors to names of files in this folder; download it again."
        )
    return index


def _names_a_file(value: object) -> bool:
    """Whether it is a name that a file of this folder can have: no path out of it, no more than 255 bytes."""
    return isinstance(value, str) and Path(value).name == value and len(value.encode(errors="replace")) < 256


def parse(path: AnyPath) -> File:
    """The header of one file, checked: tensors follow one another and end where the file ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > _MAX_HEADER:
            raise UserError(
                f"{path}: its header claims {length} bytes, but the file has {size}: "
                "truncated or not safetensors; download it again."
            )
        text = file.read(length)
    try:
        header = parse_json(text, _unique)
        if not isinstance(header, dict):
            raise TypeError(f"no table but {type(header).__name__}")
        metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
        entries = {name: _entry(path, name, value) for name, value in header.items()}
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: the header is not that of safetensors ({error}); download it again."
        ) from None

    ordered = sorted(entries.items(), key=lambda item: item[1][1:])
    end = 0
    for name, (_, begin, stop) in ordered:
        if begin != end:
            raise UserError(
                f"{path}: {name} begins at {begin} where {end} was expected: tensors overlap or leave a gap; "
                "download the file again."
            )
        end = stop
    data = 8 + length
    if data + end != size:
        what = "is truncated" if data + end > size else "has bytes that belong to no tensor"
        raise UserError(
            f"{path}: tensors end at byte {data + end}, but the file has {size}: it {what}; download again."
        )
    return File(
        path,
        {n: spec for n, (spec, *_) in ordered},
        {n: data + begin for n, (_, begin, _) in ordered},
        metadata,
    )


def _entry(path: AnyPath, name: str, entry: dict[str, Any]) -> tuple[TensorSpec, int, int]:
    """Spec, begin and end of one tensor."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise UserError(
            f"{path}: {name} has shape {shape} at {begin}–{end}; the header is damaged, download again."
        )
    try:
        _, item = block_and_bytes(str(dtype))
    except UserError:
        raise UserError(
            f"{path}: {name} has dtype {dtype!r}, which is not known here; convert it to BF16."
        ) from None
    spec = TensorSpec(name, tuple(shape), str(dtype))
    if end - begin != math.prod(spec.shape) * item:
        raise UserError(
            f"{path}: {name} has {end - begin} bytes, but {dtype} {list(spec.shape)} needs "
            f"{math.prod(spec.shape) * item}; download the file again."
        )
    return spec, begin, end


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a tensor appears twice")
    return found
