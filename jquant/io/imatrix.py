"""Importance matrices of llama.cpp: the mean square of every input column of every matrix.

GGUF form: general.type "imatrix", imatrix.datasets (strings), imatrix.chunk_count u32,
imatrix.chunk_size u32; for each matrix NAME the tensors NAME.in_sum2 F32 [n_mat, ne0], sums of squares, and
NAME.counts F32 [n_mat, 1], how many tokens each sum has. Stacked experts have n_mat matrices. Ours says by
jquant.method where the sums are of something else than squares of inputs.

Older form (.dat), little endian:

    entries i32 | entry: length i32, name, ncall i32, nval i32, f32 [nval] = mean square · ncall
    then, where the writer was not very old: last chunk i32, length i32, name of the dataset

Source: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp of llama.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from jquant.core import Metadata, MetadataValue, TensorSpec, UserError
from jquant.io._gguf_header import MAGIC
from jquant.io.gguf import GgufSource
from jquant.io.gguf_sink import GgufSink, check_target
from jquant.io.write_errors import reporting

_SUMS, _COUNTS = ".in_sum2", ".counts"
_METHOD = "jquant.method"
IMATRIX = "imatrix"
_LONGEST_NAME = 1024  # bytes; a longer one means that these bytes are no .dat file


@dataclass(frozen=True)
class Imatrix:
    """Mean squares of the inputs of each matrix, by GGUF tensor name.

    entries: [n_mat, ne0]. counts: [n_mat], tokens in each mean (in the .dat form chunks, and n_mat is 1
    whatever the tensor: use `importance`). A matrix that no token reached has ones.
    """

    entries: Mapping[str, Float32[np.ndarray, "n_mat ne0"]] = field(repr=False)
    counts: Mapping[str, Float32[np.ndarray, " n_mat"]] = field(repr=False)
    datasets: list[str]
    chunk_count: int
    chunk_size: int  # tokens; 0 where the file does not say
    method: str = IMATRIX  # what made it: mean squares of inputs, or another importance ("fisher")

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Imatrix:
        """What `write`, or llama-imatrix, wrote, in either form. Errors are those of `read` below."""
        return read(Path(path))

    def write(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the GGUF form, or the older one where the name ends in .dat.

        force: replace a file that is there. Raises OutputError where it is there and may not be replaced or
        cannot be written, UserError for another importance than mean squares of inputs in a .dat file.
        """
        target = Path(path)
        check_target(target, force=force)
        if target.suffix == ".dat":
            write_dat(target, self)
        else:
            write_gguf(target, self, force=force)

    def importance(self, spec: TensorSpec) -> Float32[np.ndarray, "n_mat ne0"] | None:
        """The entry of a tensor, one row a matrix: a stack [experts, rows, cols] gets [experts, cols].

        None where there is no entry. Raises UserError where the sizes differ.
        """
        entry = self.entries.get(spec.name)
        if entry is None:
            return None
        n_mat = spec.shape[0] if len(spec.shape) > 2 else 1
        if entry.size != n_mat * spec.cols:
            raise UserError(
                f"{spec.name}: its imatrix entry has {entry.size} values, but shape {spec.shape} needs "
                f"{n_mat * spec.cols}; the imatrix is of another model."
            )
        return entry.reshape(n_mat, spec.cols)

    def by_tensor(self, specs: Iterable[TensorSpec]) -> dict[str, Float32[np.ndarray, "n_mat ne0"]]:
        """`importance` of those of these tensors that have an entry."""
        return {spec.name: entry for spec in specs if (entry := self.importance(spec)) is not None}


def read(path: Path) -> Imatrix:
    """Either form, told apart by the first bytes.

    Raises UserError where the file is neither, is truncated, or has a value that is no mean square.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror}.") from None
    return _read_gguf(path) if magic == MAGIC else _read_dat(path)


def _read_gguf(path: Path) -> Imatrix:
    source = GgufSource(path)
    names = [name.removesuffix(_SUMS) for name in source.specs if name.endswith(_SUMS)]
    if not names:
        kind = source.metadata.get("general.type", source.metadata.get("general.architecture", "unknown"))
        raise UserError(
            f"{path}: not an imatrix but a GGUF file of type {kind!s}; give what jquant analyze or "
            "llama-imatrix wrote."
        )
    entries, counts = {}, {}
    for name in names:
        if name + _COUNTS not in source.specs:
            raise UserError(f"{path}: {name} has sums but no counts; make the imatrix again.")
        sums = _floats(path, source, name + _SUMS)
        count = _floats(path, source, name + _COUNTS).reshape(-1)
        if count.size != len(sums):
            raise UserError(
                f"{path}: {name} has {count.size} counts for {len(sums)} matrices; make it again."
            )
        _check_finite(path, name + _COUNTS, count)
        _check_squares(path, name + _SUMS, sums)
        count = np.rint(count)
        seen = count[:, None] > 0
        # [n_mat, ne0]; llama.cpp too gives columns that no token reached the weight 1.
        entries[name] = np.where(seen, sums / np.where(seen, count[:, None], np.float32(1)), np.float32(1))
        counts[name] = count
    return Imatrix(entries, counts, *_about(source.metadata))


def _floats(path: Path, source: GgufSource, name: str) -> Float32[np.ndarray, "rows cols"]:
    if source.specs[name].type != "F32":
        raise UserError(
            f"{path}: {name} has type {source.specs[name].type}, expected F32; make the imatrix again."
        )
    return source.read(name).view("<f4")


def _about(metadata: Metadata) -> tuple[list[str], int, int, str]:
    datasets = metadata.get("imatrix.datasets", [])
    chunks, size = (metadata.get(f"imatrix.chunk_{what}", np.uint32(0)) for what in ("count", "size"))
    return (
        datasets if isinstance(datasets, list) else [],
        int(chunks) if isinstance(chunks, np.integer) else 0,
        int(size) if isinstance(size, np.integer) else 0,
        str(metadata.get(_METHOD, IMATRIX)),
    )


def _read_dat(path: Path) -> Imatrix:
    data = path.read_bytes()
    pos = 0

    def take(n: int, what: str) -> bytes:
        nonlocal pos
        if not 0 <= n <= len(data) - pos:
            raise UserError(
                f"{path}: {what} claims {n} bytes at byte {pos} of {len(data)}: the imatrix is truncated; "
                "make it again."
            )
        pos += n
        return data[pos - n : pos]

    def i32(what: str) -> int:
        return struct.unpack("<i", take(4, what))[0]

    n, first = struct.unpack_from("<ii", data) if len(data) >= 8 else (0, 0)
    if n < 1 or not 0 < first <= _LONGEST_NAME or not data[8 : 8 + first].isascii():
        raise UserError(
            f"{path}: not an imatrix, neither of GGUF nor of .dat form; give what jquant analyze or "
            "llama-imatrix wrote."
        )
    pos = 4
    entries, counts = {}, {}
    for i in range(n):
        what = f"entry {i + 1} of {n}"
        name = take(i32(what), what).decode("utf-8", "surrogateescape")
        ncall, nval = i32(name), i32(name)
        values = np.frombuffer(take(4 * nval, name), "<f4")[None]  # [1, nval]: stacks are not told apart
        _check_squares(path, name, values)
        entries[name] = values / np.float32(max(ncall, 1))
        counts[name] = np.array([ncall], np.float32)
    chunks, datasets = 0, []
    if pos < len(data):
        chunks = i32("the number of chunks")
        datasets = [take(i32("the dataset"), "the dataset").decode("utf-8", "surrogateescape")]
    return Imatrix(entries, counts, datasets, chunks, 0)


def _check_finite(path: Path, name: str, values: np.ndarray) -> None:
    _check(path, name, values, np.isfinite(values))


def _check_squares(path: Path, name: str, values: np.ndarray) -> None:
    _check(path, name, values, np.isfinite(values) & (values >= 0))


def _check(path: Path, name: str, values: np.ndarray, good: np.ndarray) -> None:
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        raise UserError(
            f"{path}: {name} has {values[where]} at {list(where)}, no mean of squares; make it again."
        )


def check_model(path: Path, imatrix: Imatrix, specs: Mapping[str, TensorSpec]) -> None:
    """UserError where an entry of a file's imatrix is no tensor of the model, or has another size."""
    for name in imatrix.entries:
        if name not in specs:
            raise UserError(
                f"{path}: has an entry for {name}, which the model does not have; it is of another model. "
                "Leave it out, or make it from this one."
            )
        try:
            imatrix.importance(specs[name])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def check_method(path: Path, imatrix: Imatrix, method: str) -> None:
    """UserError where a file's imatrix was made by another method."""
    if imatrix.method != method:
        raise UserError(
            f"{path}: was made by method {imatrix.method}, not {method}; merge what one method made."
        )


def merge(matrices: Sequence[Imatrix]) -> Imatrix:
    """One imatrix of everything that several were made of: means weighted by their counts.

    A .dat file counts in chunks and knows no stacks: it takes the chunk size and the stacks of the others, as
    llama-imatrix reads such files. Matrices that only some of them have are taken from those: whether all are
    of one model, `check_model` says. Raises UserError where the sizes of an entry or the methods differ.
    """
    methods = sorted({m.method for m in matrices})
    if len(methods) > 1:
        raise UserError(
            f"importance matrices of different methods do not merge: {' and '.join(methods)}; "
            "use those of one method."
        )
    size = max((m.chunk_size for m in matrices), default=0)
    entries: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for m in matrices for name in m.entries):
        parts = [m for m in matrices if name in m.entries]
        shape = max((m.entries[name].shape for m in parts), key=lambda shape: shape[0])
        total, sums = np.zeros(shape[0]), np.zeros(shape)
        for m in parts:
            if m.entries[name].size != sums.size:
                raise UserError(
                    f"{name}: has {sums.size} values in one imatrix and {m.entries[name].size} in another; "
                    "they are of different models."
                )
            scale = 1 if m.chunk_size or not size else size
            count = np.broadcast_to(m.counts[name].astype(np.float64) * scale, shape[0])
            sums += m.entries[name].reshape(shape).astype(np.float64) * count[:, None]
            total += count
        seen = total[:, None] > 0
        mean = np.where(seen, sums / np.where(seen, total[:, None], 1), 1)
        entries[name], counts[name] = mean.astype(np.float32), total.astype(np.float32)
    datasets = list(dict.fromkeys(name for m in matrices for name in m.datasets))
    chunks = sum(m.chunk_count for m in matrices)
    return Imatrix(entries, counts, datasets, chunks, size, methods[0] if methods else IMATRIX)


def write_gguf(path: Path, imatrix: Imatrix, *, force: bool = False) -> None:
    """The form that llama-imatrix writes and llama-quantize reads. Raises OutputError as GgufSink does."""
    metadata: dict[str, MetadataValue] = {
        "general.type": "imatrix",
        "imatrix.datasets": imatrix.datasets,
        "imatrix.chunk_count": np.uint32(imatrix.chunk_count),
        "imatrix.chunk_size": np.uint32(imatrix.chunk_size),
    }
    if imatrix.method != IMATRIX:
        metadata[_METHOD] = imatrix.method
    arrays = {}
    for name in sorted(imatrix.entries):
        count = imatrix.counts[name]
        arrays[name + _SUMS] = imatrix.entries[name] * count[:, None]
        arrays[name + _COUNTS] = count[:, None]
    layout = [TensorSpec(name, array.shape, "F32") for name, array in arrays.items()]
    with GgufSink(path, metadata, layout, force=force) as sink:
        for name, array in arrays.items():
            sink.write(name, 0, np.ascontiguousarray(array, "<f4").view(np.uint8))
            sink.finish(name)
        sink.commit()


def write_dat(path: Path, imatrix: Imatrix) -> None:
    """The older form, for tools that know no other. It has one count a matrix: chunks, rounded up.

    Matrices that no token reached at all are left out, as llama-imatrix does. Of several datasets the file
    names the last. An existing file is replaced. Raises OutputError where the file cannot be written,
    UserError for another importance than mean squares of inputs, which this form cannot tell apart.
    """
    if imatrix.method != IMATRIX:
        raise UserError(
            f"{path}: a .dat file cannot say that method {imatrix.method} made it; name the output .gguf."
        )
    stored = {name: entry for name, entry in sorted(imatrix.entries.items()) if imatrix.counts[name].any()}
    parts = [struct.pack("<i", len(stored))]
    for name, entry in stored.items():
        chunks = int(np.ceil(imatrix.counts[name].max() / max(imatrix.chunk_size, 1)))
        text = name.encode("utf-8", "surrogateescape")
        parts.append(struct.pack("<i", len(text)) + text + struct.pack("<ii", chunks, entry.size))
        parts.append((entry * np.float32(chunks)).astype("<f4").tobytes())
    dataset = (imatrix.datasets or [""])[-1].encode("utf-8", "surrogateescape")
    parts.append(struct.pack("<ii", imatrix.chunk_count, len(dataset)) + dataset)
    partial = path.with_name(path.name + ".partial")
    with reporting(path):
        partial.write_bytes(b"".join(parts))
        partial.replace(path)
