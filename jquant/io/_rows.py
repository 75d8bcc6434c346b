"""Rows of a tensor that lies whole in one file."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from jquant.core import TensorSpec, UserError
from jquant.io.paths import AnyPath, read_range


def read_rows(
    path: AnyPath, offset: int, spec: TensorSpec, start: int, stop: int | None
) -> UInt8[np.ndarray, "k b"]:
    """Rows [start, stop) of the tensor that begins at byte `offset`: uint8 [stop − start, row bytes].

    A read into a fresh buffer rather than a memory map: mapped pages count as the process's memory until
    the kernel takes them back, a buffer goes when its rows are written. Nothing stays open between
    reads, so a model of hundreds of shards needs no hundreds of descriptors, and threads share no position.

    Raises ValueError for rows that the tensor has not, UserError where the file cannot give them.
    """
    stop = spec.rows if stop is None else stop
    if not 0 <= start <= stop <= spec.rows:
        raise ValueError(f"{spec.name} has {spec.rows} rows; got [{start}, {stop}).")
    count = (stop - start) * spec.row_bytes
    try:
        data = read_range(path, offset + start * spec.row_bytes, count)
    except OSError as error:
        raise UserError(f"{path}: cannot read {spec.name}: {error.strerror or error}.") from None
    if data.size != count:
        raise UserError(
            f"{path}: {spec.name} lacks {count - data.size} bytes; the file changed while it was read."
        )
    return data.reshape(stop - start, spec.row_bytes)
