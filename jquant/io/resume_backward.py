"""What a backward pass has done so far: activations of all blocks, then statistics from the last block on.

    run.json            what is being computed; another run is refused with what differs
    activations-00004   float32 [samples, tokens, width]: what goes into block 4
    cotangents-00004    of the same shape: the gradient of the loss with respect to it
    block-00003.npz     statistics of block 3: "TENSOR|KEY" → array

Activations have their name when they are complete. A block's file appears after the cotangents before it are
on the disk; what only this block needed is deleted then. A run that was killed at any moment therefore
continues where it was, and computes the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jax import Array

from jquant.io.resume import map_file, open_run, read_stats, sync, write_stats
from jquant.io.write_errors import reporting_to_resume


class GradientCheckpoint:
    """A folder that remembers how far a backward pass through so many blocks has come."""

    def __init__(self, folder: Path, run: Mapping[str, object], blocks: int, *, resume: bool) -> None:
        """Arguments and errors are those of `checkpoint.Checkpoint`."""
        self.folder, self._blocks = folder, blocks
        open_run(folder, run, resume=resume)

    def forwarded(self) -> int:
        done = 0
        while done <= self._blocks and self._file("activations", done).exists():
            done += 1
        return done

    def restore(self) -> Iterator[dict[str, dict[str, Array]]]:
        """The statistics of the blocks that are done, the last one first, each read when it is asked for."""
        block = self._blocks
        while block > 0 and (path := self._file("block", block - 1, ".npz")).exists():
            yield read_stats(path)
            block -= 1
        for done in range(block, self._blocks):  # a run may have been killed before it deleted them
            self._delete_used(done)

    def activations(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        path = self._file("activations", i)
        if path.exists() or any(self.folder.glob("block-*.npz")):
            return map_file(path, shape, new=False)
        return map_file(path.with_suffix(".partial"), shape, new=True)

    def keep(self, i: int) -> None:
        path = self._file("activations", i)
        with reporting_to_resume(path):
            sync(path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)

    def cotangents(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        """As an earlier run left them, complete, where block i is done; else new."""
        return map_file(self._file("cotangents", i), shape, new=not self._file("block", i, ".npz").exists())

    def finish(self, block: int, stats: dict[str, dict[str, Array]]) -> None:
        before = self._file("cotangents", block)
        with reporting_to_resume(before):
            if before.exists():
                sync(before)
            write_stats(self._file("block", block, ".npz"), stats)
        self._delete_used(block)

    def _delete_used(self, block: int) -> None:
        names = ("activations", block), ("activations", block + 1), ("cotangents", block + 1)
        with reporting_to_resume(self.folder):
            for name, i in names:
                self._file(name, i).unlink(missing_ok=True)

    def _file(self, kind: str, i: int, suffix: str = "") -> Path:
        return self.folder / f"{kind}-{i:05}{suffix}"
