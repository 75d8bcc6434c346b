"""Which file each tensor goes to: one file, or shards as llama.cpp's gguf-split names and marks them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jquant.core import Metadata, TensorSpec, UserError
from jquant.io._gguf_header import alignment_of, encode, padded, tensor_info_bytes

MAX_SHARDS = 65535  # split.count is an unsigned integer of 16 bits


@dataclass(frozen=True)
class Shard:
    path: Path
    header: bytes
    offsets: dict[str, int]  # of tensors, absolute, in bytes
    size: int  # of the whole file, in bytes

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")


def shard_name(name: str, index: int, count: int) -> str:
    """llama.cpp's name of shard `index` (from 0) of the model whose file is called `name`."""
    return f"{name.removesuffix('.gguf')}-{index + 1:05d}-of-{count:05d}.gguf"


def shards(path: Path, metadata: Metadata, layout: Sequence[TensorSpec], limit: int | None) -> list[Shard]:
    """Files for the layout, none larger than `limit` bytes unless a single tensor is.

    The first carries the metadata, and each of several the keys split.no, split.count and
    split.tensors.count; what fits in one file is called `path` and has none of these.
    Raises UserError where the limit would make more than MAX_SHARDS.
    """
    whole = Shard(path, *encode(metadata, layout))
    parts = [list(layout)] if limit is None or whole.size <= limit else _split(metadata, layout, limit)
    if len(parts) == 1:
        return [whole]
    if len(parts) > MAX_SHARDS:
        raise UserError(
            f"{path}: {limit} bytes a shard would make {len(parts)} shards, but GGUF counts to {MAX_SHARDS}; "
            "allow larger ones."
        )
    found = []
    for i, part in enumerate(parts):
        keys = _split_keys(metadata, i, len(parts), len(layout))
        shard = path.with_name(shard_name(path.name, i, len(parts)))
        found.append(Shard(shard, *encode(keys, part)))
    return found


def file_bytes(metadata: Metadata, layout: Sequence[TensorSpec], limit: int | None = None) -> int:
    """Bytes of the file of this layout, or of all its shards, with headers and padding."""
    return sum(shard.size for shard in shards(Path("model.gguf"), metadata, layout, limit))


def headers_of(files: Sequence[Shard]) -> str:
    """SHA-256 of their headers: metadata, names, types and places."""
    return hashlib.sha256(b"".join(file.header for file in files)).hexdigest()


def _split(metadata: Metadata, layout: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Tensors in order, a new shard wherever the file would pass the limit."""
    alignment = alignment_of(metadata)
    parts: list[list[TensorSpec]] = [[]]
    header = len(encode(_split_keys(metadata, 0, 1, 0), [])[0])
    data = 0
    for spec in layout:
        info, nbytes = tensor_info_bytes(spec), padded(spec.nbytes, alignment)
        if parts[-1] and padded(header + info, alignment) + data + nbytes > limit:
            parts.append([])
            header, data = len(encode(_split_keys(metadata, 1, 2, 0), [])[0]), 0
        parts[-1].append(spec)
        header += info
        data += nbytes
    return parts


def _split_keys(metadata: Metadata, index: int, count: int, tensors: int) -> Metadata:
    """The metadata of one shard. Each file has its own alignment, so each must say it."""
    own = metadata if index == 0 else {k: v for k, v in metadata.items() if k == "general.alignment"}
    return {
        **own,
        "split.no": np.uint16(index),
        "split.count": np.uint16(count),
        "split.tensors.count": np.int32(tensors),
    }
