"""GgufSink: a GGUF file, or shards of one, written in place from several threads, and resumable."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jquant.core import Metadata, OutputError, Rows, TensorSpec
from jquant.io._journal import Done, Journal, Record
from jquant.io._partial import Partial
from jquant.io._parts import Part, adopt, open_journals
from jquant.io._shards import headers_of, shards
from jquant.io.write_errors import reporting_to_resume


def check_target(path: Path, *, force: bool) -> None:
    """OutputError where `path` is a folder, a file that may not be replaced, or in a folder that is not there
    or cannot be written."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file.")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists; give another name, or --force to replace it.")
    _check_folder(path)


class GgufSink:
    """Writes `path`, or `path`-00001-of-0000N.gguf and so on where one file would pass `max_shard_bytes`.

    Everything goes to `*.partial` first; `commit` syncs and renames, so nothing half-written ever has the
    final name. Beside them, `path.partial.jsonl` remembers what is finished: with `resume` and the same
    fingerprint (and layout and metadata), a run continues where another was killed, and ends with the same
    bytes. Bytes depend on metadata, layout and rows only.

    A shard's limit counts the whole file; one tensor larger than the limit gets a shard of its own. The
    first shard carries the metadata, and every shard the keys split.no, split.count, split.tensors.count.
    """

    def __init__(
        self,
        path: Path,
        metadata: Metadata,
        layout: Sequence[TensorSpec],
        *,
        max_shard_bytes: int | None = None,
        resume: bool = False,
        fingerprint: str = "",
        force: bool = False,
    ) -> None:
        """Checks, then creates the partial files at full size with their headers.

        fingerprint: names all that the rows depend on: source, plan, importance, version of the code.

        Raises OutputError where the output exists (unless `force`), its folder is missing or cannot be
        written, the disk has too little space, or a partial output is of another fingerprint.
        """
        self.path = path
        self._shards = shards(path, metadata, layout, max_shard_bytes)
        self._layout = layout
        self._renaming = False  # an earlier run was stopped within its commit
        self._closed = False

        _check_folder(path)
        journal_path = _journal_path(path)
        with reporting_to_resume(journal_path):
            created = not journal_path.exists()
            self._journal = Journal(journal_path)
        self._partial = Partial(self._shards, layout, self._journal)
        self._fingerprint = f"{fingerprint} {headers_of(self._shards)}"
        try:
            self._begin(resume, self._fingerprint, force)
        except BaseException:
            self._release(keep=not created)
            raise

    def _begin(self, resume: bool, fingerprint: str, force: bool) -> None:
        found = self._journal.record
        if resume and found is not None and found.fingerprint != fingerprint:
            raise OutputError(
                f"{self.path}: was begun from another model or with other settings; repeat those to continue "
                "it, or run without --resume to start over."
            )
        earlier = found if resume and found is not None and self._can_continue(found) else None
        if earlier is not None and earlier.committing:
            self._renaming = True
            self._partial.adopt(Done(spec.name) for spec in self._layout)
            return
        self._check_absent(force)
        self._check_space()
        if earlier is not None:
            self._partial.adopt(self._journal.resume(earlier))
            self._partial.create()
            self.adopt_parts()
        else:
            parts = self._parts()
            self._journal.begin(fingerprint, [shard.partial.name for shard in self._shards])
            self._discard(found)
            for part in parts:
                part.close(remove=True)
            self._partial.create()

    def _part_paths(self) -> list[Path]:
        """The journals that parts of this output have left or are writing."""
        pattern = re.compile(re.escape(self.path.name) + r"\.partial\.\d+\.jsonl")
        return sorted(p for p in self.path.parent.iterdir() if pattern.fullmatch(p.name))

    def _parts(self) -> list[Journal]:
        with reporting_to_resume(self.path):
            return open_journals(self._part_paths())

    def adopt_parts(self) -> None:
        """What a `GgufPart` of this output has finished, in this run or an earlier one, is ours.

        Raises OutputError where a part is not closed.
        """
        parts = self._parts()
        with reporting_to_resume(self._journal.path):
            adopt(parts, self._fingerprint, self._journal, self._partial)

    def _check_absent(self, force: bool) -> None:
        for shard in self._shards:
            check_target(shard.path, force=force)

    def _can_continue(self, record: Record) -> bool:
        """Every file is there in full size, under its partial name, or its final one during a commit."""

        def whole(path: Path, size: int) -> bool:
            return path.is_file() and path.stat().st_size == size

        return all(
            whole(shard.partial, shard.size) or (record.committing and whole(shard.path, shard.size))
            for shard in self._shards
        )

    def _check_space(self) -> None:
        """Discarded or continued, what partial files of this output occupy is ours again."""
        ours = [shard.partial for shard in self._shards]
        ours += [self.path.with_name(name) for name in _stale_names(self._journal.record)]
        occupied = sum(p.stat().st_blocks * 512 for p in set(ours) if p.is_file())
        available = shutil.disk_usage(self.path.parent).free + occupied
        needed = sum(shard.size for shard in self._shards)
        if needed > available:
            raise OutputError(
                f"{self.path}: needs {_bytes(needed)}, but the disk has {_bytes(available)} available; "
                "free some space, or write to another disk."
            )

    def _discard(self, stale: Record | None) -> None:
        with reporting_to_resume(self.path):
            for name in _stale_names(stale):
                self.path.with_name(name).unlink(missing_ok=True)
            for shard in self._shards:
                shard.partial.unlink(missing_ok=True)

    def write(self, name: str, start: int, rows: UInt8[np.ndarray, "k b"]) -> None:
        """Put rows (uint8 [k, row bytes]) of a tensor at row `start`; each row once.

        Raises OutputError where the disk does not take them; what was finished stays for a resumed run.
        """
        self._partial.write(name, start, rows)

    def rewrite(self, name: str, rows: UInt8[np.ndarray, "k b"]) -> None:
        """Put other rows in place of all of a finished tensor. A resumed run finds these, or some of them."""
        self._partial.write(name, 0, rows)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "k b"]:
        """Rows [start, stop) of a finished tensor, as they were written."""
        return self._partial.read(name, start, stop)

    def finish(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Rows [start, stop) of this tensor, by default all, are written: remember it for a resumed run."""
        self._partial.finish(name, start, stop)

    def finished(self) -> tuple[str, ...]:
        """Tensors that need no writing any more: those of an interrupted run, then those of this one."""
        return self._partial.finished()

    def left(self) -> list[Rows]:
        """What is not finished, by this run or an interrupted one, in the order of the layout."""
        return self._partial.left()

    @property
    def renaming(self) -> bool:
        """An earlier run was stopped within its commit: nothing can be read or written, only committed."""
        return self._renaming

    @property
    def paths(self) -> list[Path]:
        """The files that `commit` makes: the one asked for, or its shards."""
        return [shard.path for shard in self._shards]

    def commit(self) -> None:
        """Sync and rename. Shards appear from the last to the first, so whoever sees the first sees all."""
        missing = list(dict.fromkeys(rows.name for rows in self.left()))
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} tensors are not finished, the first is {missing[0]}."
            )
        with reporting_to_resume(self.path):
            if not self._renaming:
                self._partial.sync()
                self._journal.committing()
            for shard in reversed(self._shards):
                # After a commit that was cut short, some have their final name already.
                if shard.partial.exists():
                    shard.partial.replace(shard.path)
            _sync_folder(self.path.parent)
        self._release(keep=False)

    def close(self) -> None:
        """Release the files without committing; finished tensors stay for a resumed run.

        Where there is none, the partial files go too. After `commit` this does nothing.
        """
        if not self._closed:
            self._release(keep=bool(self._partial.begun or self._part_paths()))

    def _release(self, *, keep: bool) -> None:
        """Close everything; unless `keep`, nothing with a partial name remains."""
        self._closed = True
        self._partial.close()
        if not keep:
            for shard in self._shards:
                shard.partial.unlink(missing_ok=True)
        self._journal.close(remove=not keep)

    def __enter__(self) -> GgufSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GgufPart(Part):
    """What a process other than the first writes of the files of a `GgufSink`, in a folder they share."""

    def __init__(
        self,
        path: Path,
        metadata: Metadata,
        layout: Sequence[TensorSpec],
        process: int,
        *,
        max_shard_bytes: int | None = None,
        fingerprint: str = "",
    ) -> None:
        """process: from 1. The others as of the sink, which is made before.

        Raises OutputError where the files of the sink are not here.
        """
        files = shards(path, metadata, layout, max_shard_bytes)
        journal = path.with_name(f"{path.name}.partial.{process}.jsonl")
        super().__init__(journal, files, layout, f"{fingerprint} {headers_of(files)}")


def _journal_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial.jsonl")


def headers_digest(
    path: Path, metadata: Metadata, layout: Sequence[TensorSpec], max_shard_bytes: int | None
) -> str:
    """Of all headers that this output would have: metadata, names, types and places."""
    return headers_of(shards(path, metadata, layout, max_shard_bytes))


def _stale_names(record: Record | None) -> list[str]:
    """Partial files that a journal names; never another file, whatever the journal says."""
    names = [] if record is None else record.files
    return [name for name in names if name.endswith(".partial") and Path(name).name == name]


def _check_folder(path: Path) -> None:
    if not path.name:
        raise OutputError(f"{path}: is a folder; give the name of a file.")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"{path}: the folder {folder} cannot be written; choose another, or change its rights."
        )


def _sync_folder(folder: Path) -> None:
    """A rename is durable once its folder is; some file systems cannot sync folders."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 10_000_000 else f"{n / 1e6:.3f} MB"
