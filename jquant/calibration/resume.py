"""A calibration's checkpoint in a folder that several processes share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jax import Array

from jquant.core import OutputError
from jquant.distributed.team import ALONE, Team
from jquant.io.resume import (
    Checkpoint,
    activations_file,
    block_file,
    map_samples,
    read_stats,
    sync_activations,
)


class SharedCheckpoint:
    """A `Checkpoint`, of which each process has the activations of its own samples.

    The first process makes the files and says what is done, the others follow it. Another number of processes
    may continue. All of them make the same calls.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, object],
        *,
        resume: bool,
        samples: int,
        mine: slice = slice(None),
        team: Team = ALONE,
    ) -> None:
        """samples: of all processes. mine: those of this one. Other arguments and errors: `Checkpoint`'s; an
        error of the first process reaches the others by their next exchange."""
        self._folder, self._samples, self._mine, self._team = folder, samples, mine, team
        self._first = Checkpoint(folder, run, resume=resume) if team.me == 0 else None

    def restore(self) -> Iterator[dict[str, dict[str, Array]]]:
        """The statistics of the blocks that are done, in order, each read when it is asked for."""
        done = int(self._team.told("" if self._first is None else str(self._first.done())))
        if self._first is not None:
            yield from self._first.restore()
        else:
            for block in range(done):
                yield read_stats(self._shared(block_file(self._folder, block)))

    def activations(self, block: int, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of this process's samples, a part of the file."""
        whole = self._samples, *shape[1:]
        made = None if self._first is None else self._first.activations(block, whole)
        self._team.told("")  # the file is there
        if made is None:
            made = map_samples(self._shared(activations_file(self._folder, block)), whole, new=False)
        return made[self._mine]

    def finish(self, block: int, stats: dict[str, dict[str, Array]]) -> None:
        """The activations behind this block go to the disk, those of all, before its file appears."""
        if self._first is None:
            sync_activations(self._folder, block + 1)
        self._team.told("")  # the others have
        if self._first is not None:
            self._first.finish(block, stats)

    def _shared(self, path: Path) -> Path:
        """A file that the first process has made. Raises OutputError where it is not here."""
        if not path.exists():
            raise OutputError(f"{path}: is not here; name a folder that all processes share.")
        return path
