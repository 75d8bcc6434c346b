"""Log-probabilities of a whole vocabulary on the disk, chunk by chunk: what an original expects of a text.

A row of log-probabilities is a float32 offset a, a float32 step b and a uint16 code c for each token, so that
log p ≈ a + b c. The step is (largest − smallest)/65535, with what lies more than 64 nats below the largest
raised to there: at most 0.001 nats, some 0.0004 in practice. Read back, the rows are normalised again, which
leaves a KL divergence of about b²/24 < 1e-8 between a row and itself. (llama-perplexity's own file has the
same codes over 16 nats.)

File: one line of JSON ("key", "chunks", "rows", "vocab"), then for each chunk nll float32 [rows], top int32
[rows], a float32 [rows], b float32 [rows], codes uint16 [rows, vocab], little-endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from jaxtyping import Float32, Int32, UInt16

from jquant.core.human import human_size
from jquant.io.space import reserve
from jquant.io.write_errors import reporting

RANGE = 64.0  # nats below the largest that are told apart; e⁻⁶⁴ is 1.6e-28
_LEVELS = 65535


class Rows(NamedTuple):
    """n predictions: the exact figures of what came and of what was expected most, and the rest in codes."""

    nll: Float32[np.ndarray, " n"]
    top: Int32[np.ndarray, " n"]
    offset: Float32[np.ndarray, " n"]
    step: Float32[np.ndarray, " n"]
    codes: UInt16[np.ndarray, "n vocab"]


def encode(logp: np.ndarray, nll: np.ndarray, top: np.ndarray) -> Rows:
    """logp: float32 [n, vocab], normalised; −inf is allowed."""
    largest = logp.max(axis=-1, keepdims=True)
    floored = np.maximum(logp, largest - np.float32(RANGE))
    offset = floored.min(axis=-1, keepdims=True)
    step = (largest - offset) / np.float32(_LEVELS)
    floored -= offset
    floored /= np.where(step > 0, step, np.float32(1))
    np.rint(floored, out=floored)
    return Rows(nll, top, offset[:, 0], step[:, 0], floored.astype(np.uint16))


def decode(rows: Rows) -> Float32[np.ndarray, "n vocab"]:
    """log p, not yet normalised."""
    logp = rows.codes.astype(np.float32)
    logp *= rows.step[:, None]
    logp += rows.offset[:, None]
    return logp


def key_of(facts: Mapping[str, object]) -> str:
    """A name for what the predictions depend on; facts are JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


class LogProbs:
    """A complete file. Chunks are read when asked for; one at a time is in memory."""

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int], start: int) -> None:
        self._file, self._shape, self._start = file, shape, start

    @property
    def chunks(self) -> int:
        return self._shape[0]

    @property
    def nbytes(self) -> int:
        return self._start + size(*self._shape)

    def read(self, i: int) -> Rows:
        _, n, vocab = self._shape
        self._file.seek(self._start + i * _chunk_bytes(n, vocab))

        def take(kind: type, *shape: int) -> np.ndarray:
            data = self._file.read(int(np.prod(shape)) * np.dtype(kind).itemsize)
            return np.frombuffer(data, np.dtype(kind).newbyteorder("<")).astype(kind).reshape(shape)

        return Rows(
            take(np.float32, n),
            take(np.int32, n),
            take(np.float32, n),
            take(np.float32, n),
            take(np.uint16, n, vocab),
        )

    def close(self) -> None:
        self._file.close()


def _chunk_bytes(n: int, vocab: int) -> int:
    return n * (16 + 2 * vocab)


def size(chunks: int, n: int, vocab: int) -> int:
    """Bytes of so many chunks."""
    return chunks * _chunk_bytes(n, vocab)


def find(folder: Path | None, key: str, shape: tuple[int, int, int]) -> LogProbs | None:
    """The file of this key, if it is there and whole. shape: chunks, rows of each, vocabulary."""
    path = folder and _path(folder, key)
    if path is None or not path.is_file():
        return None
    file = path.open("rb")
    header = _header(key, shape)
    if file.read(len(header)) == header and path.stat().st_size == len(header) + size(*shape):
        return LogProbs(cast(BinaryIO, file), shape, len(header))
    file.close()
    return None


def write(folder: Path | None, key: str, shape: tuple[int, int, int], chunks: Iterator[Rows]) -> LogProbs:
    """Write the chunks and open the result: a file of `folder`, there when it is complete, or without one a
    temporary file that is gone when it is closed.

    Raises OutputError where the disk has no room for it, or the folder cannot be written.
    """
    header = _header(key, shape)
    place = folder or Path(tempfile.gettempdir())
    total = len(header) + size(*shape)
    with _reporting(place, total):
        place.mkdir(parents=True, exist_ok=True)
        partial = tempfile.NamedTemporaryFile(  # noqa: SIM115
            dir=place, prefix="predictions-", suffix=".partial", delete=False
        )
    try:
        with _reporting(place, total):
            reserve(cast(BinaryIO, partial), total)
            partial.write(header)
        for rows in chunks:
            with _reporting(place, total):
                for part in rows:
                    little = part.astype(part.dtype.newbyteorder("<"), copy=False)
                    partial.write(np.ascontiguousarray(little).data)
        with _reporting(place, total):
            partial.flush()
            if folder is not None:
                os.fsync(partial.fileno())
                Path(partial.name).replace(_path(folder, key))
            file = open(partial.name if folder is None else _path(folder, key), "rb")  # noqa: PTH123, SIM115
    finally:
        partial.close()
        # An open file without a name lives on until it is closed.
        Path(partial.name).unlink(missing_ok=True)
    return LogProbs(file, shape, len(header))


def _path(folder: Path, key: str) -> Path:
    return folder / f"predictions-{key}.bin"


def _header(key: str, shape: tuple[int, int, int]) -> bytes:
    chunks, rows, vocab = shape
    return json.dumps({"key": key, "chunks": chunks, "rows": rows, "vocab": vocab}).encode() + b"\n"


def _reporting(folder: Path, total: int) -> contextlib.AbstractContextManager[None]:
    return reporting(
        folder,
        what=f"take {human_size(total)} of the original's predictions",
        full="score fewer --chunks, or name a folder of another disk with --cache-dir",
        refused="name another folder with --cache-dir",
    )
