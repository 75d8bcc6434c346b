"""Findings: what a run has found out before it can write, for the run that resumes it.

    OUT.partial.findings/.jquant              what is being made, and a lock: see `_journal`
    OUT.partial.findings/searched-00003.npz   arrays of block 3, by name

A file appears when it is complete and on the disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jquant.core import OutputError, UserError
from jquant.io._journal import Journal
from jquant.io.resume import read_arrays, write_arrays
from jquant.io.write_errors import reporting_to_resume

_MARK = ".jquant"


class Findings:
    """Those of the output `out`, by step and block. Use it as a context: what ends well, or by a mistake in
    the input, leaves nothing; what anything else ends leaves what a resumed run recalls."""

    def __init__(self, out: Path, fingerprint: str, *, resume: bool) -> None:
        """fingerprint: names all that they depend on. Without `resume`, those of an earlier run are deleted.

        Raises OutputError where what is resumed has another fingerprint, another run is at it, or the folder
        cannot be written.
        """
        self._folder = out.with_name(out.name + ".partial.findings")
        mark = self._folder / _MARK
        with reporting_to_resume(self._folder):
            if self._folder.exists() and not mark.is_file():
                raise OutputError(f"{self._folder}: is in the way and none of ours; move it.")
            self._folder.mkdir(exist_ok=True)
            self._journal = Journal(mark)
            found = self._journal.record
            if not resume or found is None:
                for path in self._folder.glob("*.npz"):
                    path.unlink()
                self._journal.begin(fingerprint, [])
            elif found.fingerprint != fingerprint:
                self._journal.close(remove=False)
                raise OutputError(
                    f"{out}: was begun from another model, from other text or with other settings; repeat "
                    "those to continue it, or run without --resume to start over."
                )

    def recall(self, step: str, block: int) -> dict[str, np.ndarray] | None:
        """None where it is not known. Raises UserError where the file is damaged."""
        path = self._path(step, block)
        return read_arrays(path) if path.exists() else None

    def remember(self, step: str, block: int, arrays: Mapping[str, np.ndarray]) -> None:
        path = self._path(step, block)
        with reporting_to_resume(path):
            write_arrays(path, arrays)

    def _path(self, step: str, block: int) -> Path:
        return self._folder / f"{step}-{block:05}.npz"

    def __enter__(self) -> Findings:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        mended = kind is None or (issubclass(kind, UserError) and not issubclass(kind, OutputError))
        kept = not mended and any(self._folder.glob("*.npz"))
        if not kept:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._journal.close(remove=False)
