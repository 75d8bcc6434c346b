"""The partial files of an output, open: rows go where they belong, and the journal learns what is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jquant.core import OutputError, TensorSpec
from jquant.io._journal import Journal
from jquant.io._shards import Shard

# Between two syncs: so much work may be lost when the machine (not the process) goes down. A sync of this
# size takes well under a second on the disks in use, and the kernel would have to write these bytes anyway.
SYNC_BYTES = 256 << 20


class Partial:
    """What sinks and their parts do alike. Several processes may have the same files open, each with a
    journal of its own, and write disjoint tensors."""

    def __init__(self, shards: Sequence[Shard], layout: Sequence[TensorSpec], journal: Journal) -> None:
        self.shards, self._journal = shards, journal
        self._layout = {spec.name: spec for spec in layout}
        self._rows_left = {spec.name: spec.rows for spec in layout}
        self._finished: dict[str, None] = {}  # in order
        self._lock = threading.Lock()
        self._unsynced = 0
        self._fds: list[int] = []
        self._where: dict[str, tuple[Shard, int, int]] = {}

    def create(self) -> None:
        """Make the files at full size with their headers, or open them as an earlier run made them."""
        for shard in self.shards:
            with reporting(shard.partial):
                fd = self._open(shard, os.O_RDWR | os.O_CREAT)
                os.ftruncate(fd, shard.size)  # padding between tensors is never written: it reads as zeros
                _write_at(fd, shard.header, 0)

    def join(self) -> None:
        """Open the files that another process made. Raises OutputError where they are not here."""
        for shard in self.shards:
            if not shard.partial.is_file() or shard.partial.stat().st_size != shard.size:
                raise OutputError(
                    f"{shard.partial}: is not what process 0 has just made; write to a folder that all "
                    "processes share."
                )
            with reporting(shard.partial):
                self._open(shard, os.O_RDWR)

    def _open(self, shard: Shard, flags: int) -> int:
        fd = os.open(shard.partial, flags, 0o644)
        self._fds.append(fd)
        self._where |= {name: (shard, fd, offset) for name, offset in shard.offsets.items()}
        return fd

    def write(self, name: str, start: int, rows: UInt8[np.ndarray, "k b"]) -> None:
        """Put rows (uint8 [k, row bytes]) of a tensor at row `start`; each row once.

        Raises OutputError where the disk does not take them; what was finished stays for a resumed run.
        """
        spec = self._layout[name]
        if not 0 <= start <= start + len(rows) <= spec.rows or rows.shape[1] != spec.row_bytes:
            raise ValueError(
                f"{name}: {spec.rows} rows of {spec.row_bytes} bytes; got {rows.shape} at row {start}."
            )
        shard, fd, offset = self._where[name]
        with reporting(shard.partial):
            _write_at(fd, np.ascontiguousarray(rows).data, offset + start * spec.row_bytes)
        with self._lock:
            self._rows_left[name] -= len(rows)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "k b"]:
        """Rows [start, stop) of a finished tensor, as they were written."""
        spec = self._layout[name]
        shard, fd, offset = self._where[name]
        with reporting(shard.partial):
            count = (spec.rows if stop is None else stop) - start
            data = os.pread(fd, count * spec.row_bytes, offset + start * spec.row_bytes)
        return np.frombuffer(data, np.uint8).reshape(count, spec.row_bytes)

    def finish(self, name: str) -> None:
        """All rows of this tensor are written: remember it for a resumed run."""
        with self._lock:
            if self._rows_left[name] != 0:
                raise ValueError(f"{name}: {self._rows_left[name]} rows are still to be written.")
            with reporting(self._journal.path):
                self._journal.finish(name)
                self._finished[name] = None
                self._unsynced += self._layout[name].nbytes
                if self._unsynced >= SYNC_BYTES:
                    self.sync()

    def adopt(self, names: Iterable[str]) -> None:
        """These tensors are in the files, whoever wrote them."""
        with self._lock:
            self._finished |= dict.fromkeys(names)

    def finished(self) -> tuple[str, ...]:
        """Tensors that need no writing any more: those of an interrupted run, then those of this one."""
        with self._lock:
            return tuple(self._finished)

    def missing(self) -> list[str]:
        """Tensors that are not finished, in the order of the layout."""
        with self._lock:
            return [name for name in self._layout if name not in self._finished]

    def sync(self) -> None:
        """Everything that the journal names is on the disk, and the journal says so."""
        for fd in self._fds:
            os.fsync(fd)
        self._journal.synced()
        self._unsynced = 0

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


@contextlib.contextmanager
def reporting(path: Path) -> Iterator[None]:
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
