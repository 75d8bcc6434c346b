"""ModelFolder: a Hugging Face model folder to write, tensor by tensor, and resumable.

    config.json | model.safetensors, or model-00001-of-0000N.safetensors and model.safetensors.index.json |
    what else the model's own folder has: tokenizer, chat template, generation settings

All of it is made in OUT.partial, which `commit` renames. In there, `.jquant` remembers finished tensors, and
`.jquant.I` those of process I.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jquant.core import OutputError, TensorSpec, UserError, block_and_bytes
from jquant.io._journal import Journal
from jquant.io._partial import Partial
from jquant.io._parts import Part, adopt, open_journals
from jquant.io._shards import Shard, headers_of
from jquant.io.safetensors import INDEX, SINGLE
from jquant.io.write_errors import reporting_to_resume

SHARD_BYTES = 5_000_000_000
_MARK = ".jquant"  # says that a partial folder is ours
# What lies beside the weights and belongs to the model.
_BESIDE = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".md")
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json")


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


class _File(Shard):
    """A file of the folder, which is partial as a whole."""

    @property
    def partial(self) -> Path:
        return self.path


class ModelFolder:
    """Writes the folder `path`. Use it as a context: what a UserError ends is deleted, what anything else
    ends stays where a tensor of it is finished, for a run that resumes it."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, object],
        layout: Sequence[TensorSpec],
        copied: Sequence[Path] = (),
        *,
        max_shard_bytes: int | None = None,
        resume: bool = False,
        fingerprint: str = "",
        force: bool = False,
    ) -> None:
        """config: of config.json. copied: files to put beside it. fingerprint: names all that rows depend on.

        Raises OutputError where the folder exists (unless `force`, and it is a model's), cannot be written,
        the disk has too little space, or what is resumed has another fingerprint.
        """
        check_folder(path, force=force)
        self.path, self._folder = path, _partial(path)
        self._files = _shards(self._folder, layout, max_shard_bytes or SHARD_BYTES)
        self._layout = layout
        self._closed = False
        self._others = False  # whether what lies there is another run's, and stays
        with reporting_to_resume(self._folder):
            self._journal = _claim(self._folder)
        self._partial = Partial(self._files, layout, self._journal)
        self._fingerprint = _named(fingerprint, self._files)
        try:
            with reporting_to_resume(self._folder):
                self._begin(resume)
                self._write_beside(config, copied)
        except BaseException:
            self.close()
            raise

    def _begin(self, resume: bool) -> None:
        found, mark = self._journal.record, self._journal.path
        if resume and found is not None and found.fingerprint != self._fingerprint:
            self._others = True
            raise OutputError(
                f"{self.path}: was begun from another model or with other settings; repeat those to continue "
                "it, or run without --resume to start over."
            )
        sizes = {file.path: file.size for file in self._files}
        whole = all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
        parts = open_journals(self._part_paths())
        if resume and found is not None and whole:
            self._partial.adopt(self._journal.resume(found))
            self._partial.create()
            adopt(parts, self._fingerprint, self._journal, self._partial)
            return
        self._journal.begin(self._fingerprint, [])
        for part in parts:
            part.close(remove=True)
        for left in self._folder.iterdir():  # by a run that was killed
            if left != mark:
                left.unlink()
        self._check_space(sum(sizes.values()))
        self._partial.create()

    def _check_space(self, needed: int) -> None:
        available = shutil.disk_usage(self._folder).free
        if needed > available:
            raise OutputError(
                f"{self.path}: needs {needed / 1e6:.1f} MB, but the disk has {available / 1e6:.1f} MB "
                "available; free some space, or write to another disk."
            )

    def _write_beside(self, config: Mapping[str, object], copied: Sequence[Path]) -> None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (self._folder / "config.json").write_text(text, encoding="utf-8")
        for file in copied:
            shutil.copyfile(file, self._folder / file.name)
        if len(self._files) > 1:
            weight_map = {name: file.path.name for file in self._files for name in file.offsets}
            total = sum(spec.nbytes for spec in self._layout)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _part_paths(self) -> list[Path]:
        """The journals that parts of this output have left or are writing."""
        pattern = re.compile(re.escape(_MARK) + r"\.\d+")
        return sorted(path for path in self._folder.iterdir() if pattern.fullmatch(path.name))

    def adopt_parts(self) -> None:
        """What its parts have finished is ours. Raises OutputError where one is not closed."""
        with reporting_to_resume(self._folder):
            adopt(open_journals(self._part_paths()), self._fingerprint, self._journal, self._partial)

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        refused = kind is not None and issubclass(kind, UserError) and not issubclass(kind, OutputError)
        self.close(keep=not refused)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Put rows (uint8 [k, row bytes]) of a tensor at row `start`. ValueError where they do not fit."""
        self._partial.write(name, start, rows)

    def finish(self, name: str) -> None:
        """All rows of this tensor are written: remember it for a resumed run."""
        self._partial.finish(name)

    def finished(self) -> tuple[str, ...]:
        """Tensors that need no writing any more: those of an interrupted run, then those of this one."""
        return self._partial.finished()

    def commit(self) -> None:
        """Make the folder appear under its name. ValueError where tensors are missing."""
        left = self._partial.left()
        if left:
            raise ValueError(f"{self.path}: {left[0].name} was not written whole.")
        with reporting_to_resume(self.path):
            self._partial.sync()
            self._partial.close()
            replaced = self.path.with_name(self.path.name + ".replaced")
            if self.path.exists():
                self.path.rename(replaced)
            self._folder.rename(self.path)
            (self.path / _MARK).unlink()
            shutil.rmtree(replaced, ignore_errors=True)
            self._closed = True
            self._journal.close(remove=False)

    def close(self, *, keep: bool = True) -> None:
        """Release what is not committed; it stays where a tensor of it is finished, unless it is not to be
        kept."""
        if self._closed:
            return
        self._closed = True
        kept = keep and bool(self._others or self._partial.begun or self._part_paths())
        self._partial.close()
        if not kept:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._journal.close(remove=not kept)


class FolderPart(Part):
    """What a process other than the first writes of the files of a `ModelFolder` that they share."""

    def __init__(
        self,
        path: Path,
        layout: Sequence[TensorSpec],
        process: int,
        *,
        max_shard_bytes: int | None = None,
        fingerprint: str = "",
    ) -> None:
        """process: from 1. The others as of the folder, which is made before.

        Raises OutputError where its files are not here.
        """
        files = _shards(_partial(path), layout, max_shard_bytes or SHARD_BYTES)
        journal = _partial(path) / f"{_MARK}.{process}"
        super().__init__(journal, files, layout, _named(fingerprint, files))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _named(fingerprint: str, files: Sequence[Shard]) -> str:
    return f"{fingerprint} {headers_of(files)}"


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


def _claim(folder: Path) -> Journal:
    """Make the folder, and lock its journal against a second run."""
    mark = folder / _MARK
    if folder.exists() and not mark.is_file():
        raise OutputError(f"{folder}: is in the way and none of ours; move it.")
    folder.mkdir(exist_ok=True)
    return Journal(mark)


def _shards(folder: Path, layout: Sequence[TensorSpec], limit: int) -> list[_File]:
    """One file, or as many as no file of several tensors passes the limit with its data."""
    parts: list[list[TensorSpec]] = [[]]
    data = 0
    for spec in layout:
        if parts[-1] and data + spec.nbytes > limit:
            parts.append([])
            data = 0
        parts[-1].append(spec)
        data += spec.nbytes
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    names = [SINGLE] if len(parts) == 1 else names
    return [_file(folder / name, part) for name, part in zip(names, parts, strict=True)]


def _file(path: Path, specs: Sequence[TensorSpec]) -> _File:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end, offsets = 0, {}
    # Tensors of wide numbers first, so that each begins at a multiple of its own size.
    for spec in sorted(specs, key=lambda spec: -block_and_bytes(spec.type)[1]):
        offsets[spec.name], begin, end = end, end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.type, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    return _File(path, head, {name: data + at for name, at in offsets.items()}, data + end)
