"""GgufSink: a GGUF file, or shards of one, written in place from several threads, and resumable."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jquant.core import Metadata, OutputError, TensorSpec
from jquant.io._journal import Journal, Record
from jquant.io._shards import Shard, shards

# Between two syncs: so much work may be lost when the machine (not the process) goes down. A sync of this
# size takes well under a second on the disks in use, and the kernel would have to write these bytes anyway.
SYNC_BYTES = 256 << 20


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
    final name. Beside them, `path.partial.jsonl` remembers finished tensors: with `resume` and the same
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
        self._layout = {spec.name: spec for spec in layout}
        self._rows_left = {spec.name: spec.rows for spec in layout}
        self._finished: dict[str, None] = {}  # in order
        self._lock = threading.Lock()
        self._unsynced = 0
        self._renaming = False  # an earlier run was stopped within its commit
        self._closed = False
        self._fds: list[int] = []
        self._where: dict[str, tuple[Shard, int, int]] = {}

        _check_folder(path)
        journal_path = path.with_name(path.name + ".partial.jsonl")
        with _reporting(journal_path):
            created = not journal_path.exists()
            self._journal = Journal(journal_path)
        try:
            self._begin(resume, f"{fingerprint} {_digest(self._shards)}", force)
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
            self._finished = dict.fromkeys(self._layout)
            return
        self._check_absent(force)
        self._check_space()
        if earlier is not None:
            self._finished = dict.fromkeys(self._journal.resume(earlier))
        else:
            self._journal.begin(fingerprint, [shard.partial.name for shard in self._shards])
            self._discard(found)
        self._open()

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
        with _reporting(self.path):
            for name in _stale_names(stale):
                self.path.with_name(name).unlink(missing_ok=True)
            for shard in self._shards:
                shard.partial.unlink(missing_ok=True)

    def _open(self) -> None:
        for shard in self._shards:
            with _reporting(shard.partial):
                fd = os.open(shard.partial, os.O_RDWR | os.O_CREAT, 0o644)
                self._fds.append(fd)
                os.ftruncate(fd, shard.size)  # padding between tensors is never written: it reads as zeros
                _write_at(fd, shard.header, 0)
            self._where |= {name: (shard, fd, offset) for name, offset in shard.offsets.items()}

    def write(self, name: str, start: int, rows: UInt8[np.ndarray, "k b"]) -> None:
        """Put rows (uint8 [k, row bytes]) of a tensor at row `start`; each row once.

        Raises OutputError where the disk does not take them; what was finished stays for a resumed run.
        """
        self._put(name, start, rows)
        with self._lock:
            self._rows_left[name] -= len(rows)

    def rewrite(self, name: str, rows: UInt8[np.ndarray, "k b"]) -> None:
        """Put other rows in place of all of a finished tensor. A resumed run finds these, or some of them."""
        self._put(name, 0, rows)

    def _put(self, name: str, start: int, rows: np.ndarray) -> None:
        spec = self._layout[name]
        if not 0 <= start <= start + len(rows) <= spec.rows or rows.shape[1] != spec.row_bytes:
            raise ValueError(
                f"{name}: {spec.rows} rows of {spec.row_bytes} bytes; got {rows.shape} at row {start}."
            )
        shard, fd, offset = self._where[name]
        with _reporting(shard.partial):
            _write_at(fd, np.ascontiguousarray(rows).data, offset + start * spec.row_bytes)

    def read(self, name: str) -> UInt8[np.ndarray, "k b"]:
        """The rows of a finished tensor, as they were written."""
        spec = self._layout[name]
        shard, fd, offset = self._where[name]
        with _reporting(shard.partial):
            data = os.pread(fd, spec.nbytes, offset)
        return np.frombuffer(data, np.uint8).reshape(spec.rows, spec.row_bytes)

    def finish(self, name: str) -> None:
        """All rows of this tensor are written: remember it for a resumed run."""
        with self._lock:
            if self._rows_left[name] != 0:
                raise ValueError(f"{name}: {self._rows_left[name]} rows are still to be written.")
            with _reporting(self._journal.path):
                self._journal.finish(name)
                self._finished[name] = None
                self._unsynced += self._layout[name].nbytes
                if self._unsynced >= SYNC_BYTES:
                    self._sync()
                    self._journal.synced()
                    self._unsynced = 0

    def finished(self) -> tuple[str, ...]:
        """Tensors that need no writing any more: those of an interrupted run, then those of this one."""
        with self._lock:
            return tuple(self._finished)

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
        missing = [name for name in self._layout if name not in self._finished]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} tensors are not finished, the first is {missing[0]}."
            )
        with _reporting(self.path):
            if not self._renaming:
                self._sync()
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
            self._release(keep=bool(self._finished))

    def _release(self, *, keep: bool) -> None:
        """Close everything; unless `keep`, nothing with a partial name remains."""
        self._closed = True
        while self._fds:
            os.close(self._fds.pop())
        if not keep:
            for shard in self._shards:
                shard.partial.unlink(missing_ok=True)
        self._journal.close(remove=not keep)

    def __enter__(self) -> GgufSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sync(self) -> None:
        for fd in self._fds:
            os.fsync(fd)


def _digest(shards: Sequence[Shard]) -> str:
    """Of all headers: metadata, names, types and places."""
    return hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()


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


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """What the operating system refuses, told as the user can mend it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{path}: no space is left ({os.strerror(error.errno)}); free some and continue with "
                "--resume, or delete the .partial files."
            ) from error
        raise OutputError(f"{path}: cannot be written: {error.strerror}.") from error


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of it: one call of the kernel takes at most 2 GiB."""
    left = memoryview(data)
    if left.nbytes == 0:
        return
    left = left.cast("B")
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


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
