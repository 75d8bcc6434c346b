"""What the processes of a run other than the first write of an output whose partial files they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jquant.core import TensorSpec
from jquant.io._journal import Journal
from jquant.io._partial import Partial
from jquant.io._shards import Shard
from jquant.io.write_errors import reporting_to_resume


class Part:
    """The rows of one process, with a journal of its own.

    It commits nothing: process 0, once this is closed, adopts what its journal names and commits. A part that
    is killed leaves its journal, from which the next run takes what is whole, whatever its number of
    processes.
    """

    def __init__(
        self,
        journal: Path,
        files: Sequence[Shard],
        layout: Sequence[TensorSpec],
        fingerprint: str,
    ) -> None:
        """Opens the partial files that process 0 has made.

        Raises OutputError where they are not here.
        """
        with reporting_to_resume(journal):
            self._journal = Journal(journal)
        self._partial = Partial(files, layout, self._journal)
        self._closed = False
        try:
            self._journal.begin(fingerprint, [])
            self._partial.join()
        except BaseException:
            self.close()
            raise

    def write(self, name: str, start: int, rows: UInt8[np.ndarray, "k b"]) -> None:
        """As `GgufSink.write`."""
        self._partial.write(name, start, rows)

    def finish(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """As `GgufSink.finish`."""
        self._partial.finish(name, start, stop)

    def close(self) -> None:
        """Bring what is written to the disk, for process 0 to adopt."""
        if self._closed:
            return
        self._closed = True
        if self._partial.wrote:
            with reporting_to_resume(self._journal.path):
                self._partial.sync()
        self._partial.close()
        self._journal.close(remove=not self._partial.wrote)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_journals(paths: Iterable[Path]) -> list[Journal]:
    """The journals of parts; OutputError where one is still at work."""
    with contextlib.ExitStack() as opened:
        journals = []
        for path in paths:
            journals.append(Journal(path))
            opened.callback(journals[-1].close, remove=False)
        opened.pop_all()
        return journals


def adopt(journals: Sequence[Journal], fingerprint: str, own: Journal, partial: Partial) -> None:
    """What these parts of an output of this fingerprint have finished is the first process's. Ends them."""
    for part in journals:
        if part.record is not None and part.record.fingerprint == fingerprint:
            for done in part.record.done:
                own.finish(done)
            partial.adopt(part.record.done)
    if journals:
        partial.sync()
    for part in journals:
        part.close(remove=True)
