"""What a calibration has done so far: after each block, its statistics and the activations behind it.

    run.json            what is being computed; another run is refused with what differs
    block-00003.npz     statistics of block 3: "TENSOR|KEY" → array
    activations-00004   float32 [samples, tokens, width]: what goes into block 4; each sample begins a
                        page, so that several machines may write one file

A block's file appears, complete, after the activations behind it are on the disk; those before it are deleted
then. A run that was killed at any moment therefore continues at the first block without a file, and computes
the same bytes; over another mesh or number of processes, sums in another order.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import jax.numpy as jnp
import numpy as np
from jax import Array

from jquant.core import UserError
from jquant.io.space import reserve
from jquant.io.write_errors import reporting_to_resume

_RUN = "run.json"
_PAGE = 1 << 16  # bytes: the largest of any common machine


class Checkpoint:
    """A folder that remembers how far a run has come."""

    def __init__(self, folder: Path, run: Mapping[str, object], *, resume: bool) -> None:
        """run: everything that the result depends on, as JSON values.

        Raises UserError where the folder holds a checkpoint and `resume` is false, or one of another run;
        OutputError where the folder cannot be used.
        """
        self.folder = folder
        open_run(folder, run, resume=resume)

    def done(self) -> int:
        """How many blocks are."""
        count = 0
        while block_file(self.folder, count).exists():
            count += 1
        return count

    def restore(self) -> Iterator[dict[str, dict[str, Array]]]:
        """The statistics of the blocks that are done, in order, each read when it is asked for."""
        done = self.done()
        for block in range(done):
            yield read_stats(block_file(self.folder, block))
        with reporting_to_resume(self.folder):
            for block in range(done):  # a run may have been killed before it deleted them
                activations_file(self.folder, block).unlink(missing_ok=True)

    def activations(self, block: int, shape: tuple[int, ...]) -> np.ndarray:
        """float32, a file: as an earlier run left it, or new where no block before this one is done."""
        done = block > 0 and block_file(self.folder, block - 1).exists()
        return map_samples(activations_file(self.folder, block), shape, new=not done)

    def finish(self, block: int, stats: dict[str, dict[str, Array]]) -> None:
        """The activations behind this block go to the disk before its file appears."""
        sync_activations(self.folder, block + 1)
        with reporting_to_resume(self.folder):
            write_stats(block_file(self.folder, block), stats)
            activations_file(self.folder, block).unlink(missing_ok=True)


def activations_file(folder: Path, block: int) -> Path:
    """What goes into this block."""
    return folder / f"activations-{block:05}"


def block_file(folder: Path, block: int) -> Path:
    """The statistics of this block."""
    return folder / f"block-{block:05}.npz"


def sync_activations(folder: Path, block: int) -> None:
    """What this process has written of what goes into the block is on the disk, if anything goes into it."""
    path = activations_file(folder, block)
    with reporting_to_resume(path):
        if path.exists():
            sync(path)


def map_samples(path: Path, shape: tuple[int, ...], *, new: bool) -> np.ndarray:
    """As `map_file`, of a shape [samples, …], where each sample begins a page."""
    numbers, page = int(np.prod(shape[1:], dtype=np.int64)), _PAGE // 4
    mapped = map_file(path, (shape[0], -(-numbers // page) * page), new=new)
    return mapped[:, :numbers].reshape(shape)  # of the same memory


def open_run(folder: Path, run: Mapping[str, object], *, resume: bool) -> None:
    """Make a checkpoint's folder, or see that the one there is of the same run. Errors: as `Checkpoint`."""
    path = folder / _RUN
    wanted = json.loads(json.dumps(run))
    with reporting_to_resume(folder):
        if path.exists():
            if not resume:
                raise UserError(f"{folder}: holds a checkpoint; add --resume, or delete the folder.")
            _check_same(path, wanted)
            return
        if folder.exists() and any(entry.name != f"{_RUN}.partial" for entry in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and holds no checkpoint; name another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(path, json.dumps(wanted, indent=2).encode())


def map_file(path: Path, shape: tuple[int, ...], *, new: bool) -> np.ndarray:
    """float32, in a file: a new one whose space is reserved, or the one that an earlier run left."""
    size = 4 * int(np.prod(shape, dtype=np.int64))
    with reporting_to_resume(path):
        if new:
            with path.open("wb") as file:
                reserve(file, size)
        elif not path.exists() or path.stat().st_size != size:
            raise UserError(f"{path}: is missing or cut short; delete the folder and start anew.")
        return cast(np.ndarray, np.memmap(path, np.float32, "r+", shape=shape))


def sync(path: Path) -> None:
    """Pages that were written through a memory map go to the disk too."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_stats(path: Path) -> dict[str, dict[str, Array]]:
    return stats_of(read_arrays(path))


def write_stats(path: Path, stats: Mapping[str, Mapping[str, Array]]) -> None:
    """The file appears when it is complete and on the disk."""
    write_arrays(path, arrays_of(stats))


def arrays_of(stats: Mapping[str, Mapping[str, Array]]) -> dict[str, np.ndarray]:
    return {f"{t}|{name}": np.asarray(a) for t, s in stats.items() for name, a in s.items()}


def stats_of(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Array]]:
    """`arrays_of` turned round."""
    stats: dict[str, dict[str, Array]] = {}
    for key, array in arrays.items():
        tensor, _, name = key.rpartition("|")
        stats.setdefault(tensor, {})[name] = jnp.asarray(array)
    return stats


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile):
        raise UserError(f"{path}: is damaged; delete the folder and start anew.") from None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An npz file, which appears when it is complete and on the disk."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _check_same(path: Path, wanted: Mapping[str, object]) -> None:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path}: is damaged; delete the folder and start anew.") from None
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        listed = "; ".join(f"{key}: {found.get(key)} there, {wanted[key]} here" for key in differing)
        raise UserError(f"{path.parent}: is the checkpoint of another run ({listed}).")


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
