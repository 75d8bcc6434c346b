"""Where the activations of all samples lie between two blocks: in memory, in a file, or on the device."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jquant.core.human import human_size
from jquant.io.space import reserve
from jquant.io.write_errors import reporting

IN_MEMORY = 8 << 30  # bytes of activations; more of them go to a file
ON_DEVICE = 0.5  # share of a device's memory that activations may take


@runtime_checkable
class Activations(Protocol):
    """float32 [s, t, width], read and written by slices of samples."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, part: Any, /) -> Any: ...

    def __setitem__(self, part: Any, value: Any, /) -> None: ...


@runtime_checkable
class Store(Protocol):
    """Keeps activations between blocks, and what an interrupted run left there."""

    def restore(self) -> Iterable[dict[str, dict[str, Array]]]:
        """The statistics of the blocks that are done, in order; the activations behind them are there too."""
        ...

    def activations(self, block: int, shape: tuple[int, ...]) -> Activations:
        """What goes into this block. May be the array of the block before, to be overwritten."""
        ...

    def finish(self, block: int, stats: dict[str, dict[str, Array]]) -> None:
        """This block is done, and the activations behind it are complete."""
        ...


class Scratch:
    """A Store that remembers nothing: one array, in memory, or in a file of `folder` where it is larger than
    `in_memory` bytes. The file is gone when the array is."""

    def __init__(self, folder: Path | None = None, in_memory: int = IN_MEMORY):
        self._folder, self._in_memory = folder, in_memory
        self._array: np.ndarray | None = None

    def restore(self) -> list[dict[str, dict[str, Array]]]:
        return []

    def activations(self, block: int, shape: tuple[int, ...]) -> np.ndarray:
        if self._array is None:
            self._array = scratch(shape, self._folder, self._in_memory)
        return self._array

    def finish(self, block: int, stats: dict[str, dict[str, Array]]) -> None:
        pass


class OnDevice:
    """A Store that remembers nothing, on the device: no activation goes to the host and back."""

    def __init__(self, batch: int):
        self._batch, self._kept = batch, None

    def restore(self) -> list[dict[str, dict[str, Array]]]:
        return []

    def activations(self, block: int, shape: tuple[int, ...]) -> Batches:
        self._kept = Batches(shape, self._batch) if self._kept is None else self._kept
        return self._kept

    def finish(self, block: int, stats: dict[str, dict[str, Array]]) -> None:
        pass


class Batches:
    """Activations as one device array for each batch. A slice is a batch, or to be written, several."""

    def __init__(self, shape: tuple[int, ...], batch: int):
        self.shape, self._batch = shape, batch
        self._arrays: dict[int, Array] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> Array:
        return self._arrays[part.start]

    def __setitem__(self, part: slice, value: np.ndarray | Array) -> None:
        for start in range(part.start, min(part.stop, len(self)), self._batch):
            first = start - part.start
            self._arrays[start] = jnp.asarray(value[first : first + self._batch])


def store_for(shape: tuple[int, ...], batch: int) -> Scratch | OnDevice:
    """Where activations of this shape are best kept: on an accelerator, where they fit beside a block."""
    device = jax.local_devices()[0]
    size = 4 * int(np.prod(shape, dtype=np.int64))
    if device.platform == "cpu" or size > ON_DEVICE * (device.memory_stats() or {}).get("bytes_limit", 0):
        return Scratch()
    return OnDevice(batch)


def scratch(shape: tuple[int, ...], folder: Path | None, in_memory: int) -> np.ndarray:
    """float32, in memory, or in a file without a name where it is larger than `in_memory` bytes.

    Raises OutputError where the folder, default: the system's for temporary files, cannot take it.
    """
    size = 4 * int(np.prod(shape, dtype=np.int64))
    if size <= in_memory:
        return np.empty(shape, np.float32)
    folder = folder or Path(tempfile.gettempdir())
    remedy = "free some space, set TMPDIR to a folder of another disk, or use fewer samples"
    takes = f"take {human_size(size)} of activations"
    with (
        reporting(folder, what=takes, full=remedy, refused=remedy),
        tempfile.TemporaryFile(dir=folder, prefix="jquant-") as file,
    ):
        reserve(cast(BinaryIO, file), size)
        return cast(np.ndarray, np.memmap(file, np.float32, "r+", shape=shape))
