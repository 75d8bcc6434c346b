"""ModelFolder: a Hugging Face model folder to write, tensor by tensor.

    config.json | model.safetensors, or model-00001-of-0000N.safetensors and model.safetensors.index.json |
    what else the model's own folder has: tokenizer, chat template, generation settings

All of it is made in OUT.partial, which `commit` renames.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jquant.core import OutputError, TensorSpec, block_and_bytes
from jquant.io._reporting import reporting
from jquant.io.safetensors import INDEX, SINGLE
from jquant.space import reserve

SHARD_BYTES = 5_000_000_000
_MARK = ".jquant"  # says that a partial folder is ours
# What lies beside the weights and belongs to the model.
_BESIDE = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".md")
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json")


def nbytes(spec: TensorSpec) -> int:
    return spec.size * block_and_bytes(spec.type)[1]


def files_beside(folder: Path) -> list[Path]:
    """Files of a model's folder that are neither weights nor its configuration."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return [
        path
        for path in found
        if (
            path.suffix in _BESIDE
            or path.name.upper().startswith(("LICENSE", "NOTICE"))
            or path.match("tok*.bin")
        )
        and path.name not in _NOT_COPIED
        and not path.name.endswith(".index.json")
    ]


@dataclass(frozen=True)
class _Shard:
    path: Path
    header: bytes
    offsets: Mapping[str, int]  # absolute
    size: int


class ModelFolder:
    """Writes the folder `path`. Use it as a context: what is not committed at its end is deleted."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, object],
        layout: Sequence[TensorSpec],
        copied: Sequence[Path] = (),
        *,
        max_shard_bytes: int | None = None,
        force: bool = False,
    ) -> None:
        """config: of config.json. copied: files to put beside it.

        Raises OutputError where the folder exists (unless `force`, and it is a model's), cannot be written,
        or the disk has too little space.
        """
        check_folder(path, force=force)
        self.path, self._partial = path, path.with_name(path.name + ".partial")
        self._layout = {spec.name: spec for spec in layout}
        self._rows_left = {spec.name: spec.rows for spec in layout}
        self._open: list[BinaryIO] = []
        self._where: dict[str, tuple[BinaryIO, int]] = {}
        self._closed = False
        with reporting(self._partial):
            self._mark = _claim(self._partial)
        try:
            with reporting(self._partial):
                self._begin(config, copied, max_shard_bytes or SHARD_BYTES)
        except BaseException:
            self.close()
            raise

    def _begin(self, config: Mapping[str, object], copied: Sequence[Path], limit: int) -> None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (self._partial / "config.json").write_text(text, encoding="utf-8")
        for file in copied:
            shutil.copyfile(file, self._partial / file.name)
        shards = _shards(self._partial, list(self._layout.values()), limit)
        if len(shards) > 1:
            weight_map = {name: shard.path.name for shard in shards for name in shard.offsets}
            total = sum(map(nbytes, self._layout.values()))
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for shard in shards:
            file = shard.path.open("wb")
            self._open.append(file)
            reserve(file, shard.size)
            file.write(shard.header)
            self._where |= {name: (file, offset) for name, offset in shard.offsets.items()}

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Put rows (uint8 [k, row bytes]) of a tensor at row `start`. ValueError where they do not fit."""
        spec, (file, offset) = self._layout[name], self._where[name]
        row = nbytes(spec) // max(spec.rows, 1)
        if rows.shape[1:] != (row,) or not 0 <= start <= start + len(rows) <= spec.rows:
            raise ValueError(f"{name}: rows {rows.shape} at {start} do not fit {spec}.")
        with reporting(self._partial):
            file.seek(offset + start * row)
            file.write(np.ascontiguousarray(rows).data)
        self._rows_left[name] -= len(rows)

    def commit(self) -> None:
        """Make the folder appear under its name. ValueError where rows are missing."""
        missing = [name for name, left in self._rows_left.items() if left]
        if missing:
            raise ValueError(f"{self.path}: {missing[0]} was not written whole.")
        with reporting(self.path):
            for file in self._open:
                file.flush()
                os.fsync(file.fileno())
                file.close()
            (self._partial / _MARK).unlink()
            replaced = self.path.with_name(self.path.name + ".replaced")
            if self.path.exists():
                self.path.rename(replaced)
            self._partial.rename(self.path)
            shutil.rmtree(replaced, ignore_errors=True)
            self._closed = True
            os.close(self._mark)

    def close(self) -> None:
        """Delete what is not committed."""
        if self._closed:
            return
        self._closed = True
        for file in self._open:
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)
        os.close(self._mark)


def check_folder(path: Path, *, force: bool) -> None:
    """OutputError where `path` cannot become a model's folder."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; give the name of a folder to make.")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent}: is read-only; name another folder.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not force:
        raise OutputError(f"{path}: exists; give another name, or --force to replace it.")
    if not (path / "config.json").is_file() or any(child.is_dir() for child in path.iterdir()):
        raise OutputError(f"{path}: is not just a model, so it is not replaced; give another name.")


def _claim(partial: Path) -> int:
    """Make the folder, empty, and lock it against a second run. Returns the lock's descriptor."""
    mark = partial / _MARK
    if partial.exists() and not mark.is_file():
        raise OutputError(f"{partial}: is in the way and none of ours; move it.")
    partial.mkdir(exist_ok=True)
    fd = os.open(mark, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise OutputError(f"{partial}: another run is writing it; wait for it or stop it.") from None
    for left in partial.iterdir():  # by a run that was killed
        if left != mark:
            left.unlink()
    return fd


def _shards(folder: Path, layout: Sequence[TensorSpec], limit: int) -> list[_Shard]:
    """One file, or as many as no file of several tensors passes the limit with its data."""
    parts: list[list[TensorSpec]] = [[]]
    data = 0
    for spec in layout:
        if parts[-1] and data + nbytes(spec) > limit:
            parts.append([])
            data = 0
        parts[-1].append(spec)
        data += nbytes(spec)
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    names = [SINGLE] if len(parts) == 1 else names
    return [_shard(folder / name, part) for name, part in zip(names, parts, strict=True)]


def _shard(path: Path, specs: Sequence[TensorSpec]) -> _Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end, offsets = 0, {}
    # Tensors of wide numbers first, so that each begins at a multiple of its own size.
    for spec in sorted(specs, key=lambda spec: -block_and_bytes(spec.type)[1]):
        offsets[spec.name], begin, end = end, end, end + nbytes(spec)
        header[spec.name] = {"dtype": spec.type, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    return _Shard(path, head, {name: data + at for name, at in offsets.items()}, data + end)
