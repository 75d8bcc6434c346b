"""The partial files of an output, open: rows go where they belong, and the journal learns what is whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt8

from jquant.core import OutputError, Rows, TensorSpec
from jquant.io._journal import Done, Journal
from jquant.io._shards import Shard
from jquant.io.write_errors import reporting_to_resume

# Between two syncs: so much work may be lost when the machine (not the process) goes down. A sync of this
# size takes well under a second on the disks in use, and the kernel would have to write these bytes anyway.
SYNC_BYTES = 256 << 20


class Partial:
    """What sinks and their parts do alike. Several processes may have the same files open, each with a
    journal of its own, and write other rows."""

    def __init__(self, shards: Sequence[Shard], layout: Sequence[TensorSpec], journal: Journal) -> None:
        self.shards, self._journal = shards, journal
        self._layout = {spec.name: spec for spec in layout}
        self._written = dict.fromkeys(self._layout, 0)  # rows that are not yet finished
        self._done: dict[str, list[tuple[int, int]]] = {}  # of each tensor disjoint, in order
        self._finished: dict[str, None] = {}  # in order
        self.wrote = False  # whether this process has finished anything
        self._lock = threading.Lock()
        self._unsynced = 0
        self._fds: list[int] = []
        self._where: dict[str, tuple[Shard, int, int]] = {}

    def create(self) -> None:
        """Make the files at full size with their headers, or open them as an earlier run made them."""
        for shard in self.shards:
            with reporting_to_resume(shard.partial):
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
            with reporting_to_resume(shard.partial):
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
        with reporting_to_resume(shard.partial):
            _write_at(fd, np.ascontiguousarray(rows).data, offset + start * spec.row_bytes)
        with self._lock:
            self._written[name] += len(rows)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "k b"]:
        """Rows [start, stop) of a finished tensor, as they were written."""
        spec = self._layout[name]
        shard, fd, offset = self._where[name]
        with reporting_to_resume(shard.partial):
            count = (spec.rows if stop is None else stop) - start
            data = os.pread(fd, count * spec.row_bytes, offset + start * spec.row_bytes)
        return np.frombuffer(data, np.uint8).reshape(count, spec.row_bytes)

    def finish(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Rows [start, stop) of this tensor, by default all, are written: remember it for a resumed run."""
        spec = self._layout[name]
        count = (spec.rows if stop is None else stop) - start
        with self._lock:
            if self._written[name] < count:
                raise ValueError(f"{name}: {count - self._written[name]} rows are still to be written.")
            self._written[name] -= count
            with reporting_to_resume(self._journal.path):
                done = Done(name) if count == spec.rows else Done(name, start, stop)
                self._journal.finish(done)
                self._add(done)
                self.wrote = True
                self._unsynced += count * spec.row_bytes
                if self._unsynced >= SYNC_BYTES:
                    self.sync()

    def adopt(self, done: Iterable[Done]) -> None:
        """These rows are in the files, whoever wrote them."""
        with self._lock:
            for one in done:
                self._add(one)

    def _add(self, done: Done) -> None:
        rows = self._layout[done.name].rows
        joined: list[tuple[int, int]] = []
        found = [*self._done.get(done.name, ()), (done.start, rows if done.stop is None else done.stop)]
        for start, stop in sorted(found):
            if joined and start <= joined[-1][1]:
                start, stop = joined[-1][0], max(stop, joined.pop()[1])
            joined.append((start, stop))
        self._done[done.name] = joined
        if joined == [(0, rows)]:
            self._finished[done.name] = None

    def finished(self) -> tuple[str, ...]:
        """Tensors that need no writing any more: those of an interrupted run, then those of this one."""
        with self._lock:
            return tuple(self._finished)

    def left(self) -> list[Rows]:
        """What is not finished, in the order of the layout."""
        found: list[Rows] = []
        with self._lock:
            for name, spec in self._layout.items():
                at = 0
                for start, stop in [*self._done.get(name, ()), (spec.rows, spec.rows)]:
                    if at < start:
                        found.append(Rows(name, at, start))
                    at = stop
        return found

    @property
    def begun(self) -> bool:
        """Whether any rows are finished."""
        return bool(self._done)

    def sync(self) -> None:
        """Everything that the journal names is on the disk, and the journal says so."""
        for fd in self._fds:
            os.fsync(fd)
        self._journal.synced()
        self._unsynced = 0

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of it: one call of the kernel takes at most 2 GiB."""
    left = memoryview(data)
    if left.nbytes == 0:
        return
    left = left.cast("B")
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written
