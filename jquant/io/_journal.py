"""What an interrupted run has already written: a small file beside the partial output.

One JSON value a line, appended with one system call, so that a line is whole or is not counted:

    {"fingerprint": …, "files": […]}   what is being made, and the partial files of it
    {"boot": …}                        the boot of the machine that wrote the next lines
    "blk.0.attn_q.weight"              a finished tensor, its bytes handed to the kernel before
    ["blk.0.ffn_up.weight", 0, 2048]   rows of one, likewise
    {"synced": true}                   all of the above is on the disk (fsync)
    {"committing": true}               so is everything; files are being renamed

A killed process loses nothing that the kernel has: within one boot every line counts, and nothing needs a
sync. A machine that went down loses what was not synced: after another boot (or where the boot cannot be
told, outside Linux) only lines up to the last sync count.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jquant.core import OutputError


class Done(NamedTuple):
    """Rows [start, stop) of a tensor, by default all of them, that are written."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass
class Record:
    """The content of a journal that counts. end: its length in bytes."""

    fingerprint: str
    files: list[str]
    done: list[Done] = field(default_factory=list)
    committing: bool = False
    end: int = 0


class Journal:
    """The open journal of one output, locked against a second run that writes the same output."""

    def __init__(self, path: Path) -> None:
        """Opens or creates it; `record` is what an earlier run left, None where that cannot be used."""
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks; there, two runs at once are the user's own care.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(self._fd)
                raise OutputError(
                    f"{path}: another run is writing this output; wait for it or stop it."
                ) from None
        self.record = _parse(path.read_bytes(), _boot())

    def begin(self, fingerprint: str, files: list[str]) -> None:
        """Forget everything and start anew. On the disk before anything else is touched."""
        os.ftruncate(self._fd, 0)
        self._append({"fingerprint": fingerprint, "files": files}, {"boot": _boot()})
        os.fsync(self._fd)

    def resume(self, record: Record) -> list[Done]:
        """Continue the record that was found: what is finished."""
        os.ftruncate(self._fd, record.end)
        self._append({"boot": _boot()})
        return record.done

    def finish(self, done: Done) -> None:
        self._append(done.name if done.stop is None else done)

    def synced(self) -> None:
        self._append({"synced": True})

    def committing(self) -> None:
        self._append({"committing": True})
        os.fsync(self._fd)

    def close(self, *, remove: bool) -> None:
        """Release the lock; `remove` where nothing is left to resume."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def _append(self, *values: object) -> None:
        data = "".join(json.dumps(value) + "\n" for value in values).encode()
        # At the end of what is there, whoever wrote it: a short write leaves half a line, and the lines
        # after that do not count.
        os.pwrite(self._fd, data, os.fstat(self._fd).st_size)


def _parse(data: bytes, boot: str | None) -> Record | None:
    lines = data.splitlines(keepends=True)
    record: Record | None = None
    synced, synced_end, written_in, end = 0, 0, None, 0
    for line in lines:
        value = _json(line)
        if value is None:
            break
        end += len(line)
        if record is None:
            record = _record(value)
            if record is None:
                return None
            synced_end = end
        elif isinstance(value, Done):
            record.done.append(value)
        elif "boot" in value:
            written_in = value["boot"]
        else:
            synced, synced_end = len(record.done), end
            record.committing = "committing" in value
    if record is None:
        return None
    same_boot = boot is not None and written_in == boot
    record.end = end if same_boot else synced_end
    record.done = record.done if same_boot else record.done[:synced]
    return record


def _record(first: dict[str, object] | Done) -> Record | None:
    """The record that the first line begins; None where this is no journal of ours."""
    if isinstance(first, dict):
        fingerprint, files = first.get("fingerprint"), first.get("files")
        if isinstance(fingerprint, str) and isinstance(files, list):
            return Record(fingerprint, files)
    return None


def _json(line: bytes) -> dict[str, object] | Done | None:
    """The value of a whole line, None for a torn one."""
    if line.endswith(b"\n"):
        with contextlib.suppress(ValueError):
            match json.loads(line):
                case dict() as value:
                    return value
                case str() as name:
                    return Done(name)
                case [str() as name, int() as start, int() as stop]:
                    return Done(name, start, stop)
    return None


def _boot() -> str | None:
    """What tells this boot of the machine from every other one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
