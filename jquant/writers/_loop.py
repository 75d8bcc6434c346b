"""The loop: source → transcode → sink, tensor by tensor, slab by slab, on all cores.

A job is a slab of rows of one tensor: read it, encode it, write it where it belongs. Jobs are independent, so
a few threads that each take the next one overlap reading, encoding and writing, and no more than one slab a
thread is in memory. The order in which jobs end has no influence on the bytes.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jquant.checkpoints import FLOAT_DTYPES, LOW_BPW, slab_rows, transcode
from jquant.core import Effort, QuantizedTensor, Rows, Source, UserError, Writer, at_effort, dequantize
from jquant.formats import FORMATS
from jquant.plan import Entry, Plan

# Importance of a protected weight, relative to that of its block: large enough that the search gives up the
# others for it, small enough that float32 still tells these apart.
PROTECTION = 1e3

F16_MAX = float(np.finfo(np.float16).max)

# Σ w (x − x̂)² and Σ w x² of some rows, w importance or 1.
Loss = tuple[float, float]

# Tensor name, source bytes that are now done; no name for what is not this run's to do.
Progress = Callable[[str, int], None]


class Job(NamedTuple):
    entry: Entry
    rows: Rows  # that this is a part of
    start: int
    stop: int


def run(
    source: Source,
    plan: Plan,
    sink: Writer,
    rows: Iterable[Rows] | None = None,
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    protected: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    effort: Effort = "fast",
    threads: int = 2,
    devices: Mesh | None = None,
    progress: Progress = lambda name, done: None,
) -> dict[str, Loss]:
    """Write these rows of the plan's tensors, by default all. The caller commits the sink.

    Returns what is lost in each tensor with few bits (transcode.LOW_BPW), as its bytes decode, in these rows.

    importance: per tensor name float32 [matrices, cols], where a stack of experts has one row for each; a
    tensor without an entry is encoded without importance. protected: per tensor name (row, column) of single
    weights that the search keeps as they are, as nearly as the type can, at the cost of their block; rows
    count through all matrices of a stack. devices: of this process, of one axis, that share the rows of each
    slab; default: one.

    Raises UserError for a weight that is no finite number, tensor and position named, and for a tensor whose
    weights are too large for its type.
    """
    importance, protected = importance or {}, protected or {}
    entries = {entry.name: entry for entry in plan.entries}
    if rows is None:
        rows = [Rows(entry.name, 0, entry.spec.rows) for entry in plan.entries]
    rows, device_count = list(rows), 1 if devices is None else devices.size
    mine = sum((r.stop - r.start) * source.specs[r.name].row_bytes for r in rows)
    progress("", sum(source.specs[name].nbytes for name in entries) - mine)
    todo = [job for r in rows for job in _slabs(r, entries[r.name], device_count)]
    open_jobs = Counter(job.rows for job in todo)
    lock = threading.Lock()
    jobs = iter(todo)
    sums: dict[str, list[Loss]] = {}

    def work() -> None:
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            name = job.entry.name
            data, loss, total = _encode(
                source, job, importance.get(name), protected.get(name, ()), effort, devices
            )
            sink.write(name, job.start, data)
            with lock:
                if job.entry.type != job.entry.source_type and FORMATS[job.entry.type].bpw <= LOW_BPW:
                    sums.setdefault(name, []).append((loss, total))
                open_jobs[job.rows] -= 1
                is_last = open_jobs[job.rows] == 0
            if is_last:
                sink.finish(*job.rows)
            progress(name, (job.stop - job.start) * source.specs[name].row_bytes)

    def work_or_stop_all() -> None:
        nonlocal jobs
        try:
            work()
        except BaseException:
            jobs = iter(())
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="jquant") as pool:
        futures = [pool.submit(work_or_stop_all) for _ in range(threads)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C: let each thread end its slab, then leave
            jobs = iter(())
            raise
        for future in futures:
            future.result()
    return {name: _sum(parts) for name, parts in sums.items()}


def relative_errors(parts: Iterable[Mapping[str, Loss]]) -> dict[str, float]:
    """Σ w (x − x̂)² / Σ w x² of each tensor over all parts, w importance or 1, where it is a finite number."""
    sums: dict[str, list[Loss]] = {}
    for part in parts:
        for name, loss in part.items():
            sums.setdefault(name, []).append(loss)
    relative = {}
    for name, losses in sums.items():
        loss, total = _sum(losses)
        share = loss / total if total > 0 else 0.0
        if math.isfinite(share):
            relative[name] = share
    return relative


def _sum(losses: Sequence[Loss]) -> Loss:
    loss, total = map(math.fsum, zip(*losses, strict=True))
    return loss, total


def _slabs(rows: Rows, entry: Entry, devices: int) -> Iterator[Job]:
    step = slab_rows(entry.spec.cols) * devices
    for start in range(rows.start, rows.stop, step):
        yield Job(entry, rows, start, min(start + step, rows.stop))


def _encode(
    source: Source,
    job: Job,
    importance: np.ndarray | None,
    protected: Sequence[tuple[int, int]],
    effort: Effort,
    devices: Mesh | None,
) -> tuple[np.ndarray, float, float]:
    """Read and encode one slab: uint8 [rows, row bytes], and `Encoded`'s loss and total."""
    entry, _, start, stop = job
    data = source.read(entry.name, start, stop)
    if entry.type == entry.source_type:
        if entry.type in FLOAT_DTYPES:
            finite = bool(np.isfinite(data.view(FLOAT_DTYPES[entry.type])).all())
            _check_finite(finite, job, data)
        return data, 0.0, 0.0
    if importance is not None:
        matrix_rows = source.specs[entry.name].rows // importance.shape[0]
        importance = importance[np.arange(start, stop) // matrix_rows]
    stored, target = FORMATS[entry.source_type], at_effort(FORMATS[entry.type], effort)
    encoded = transcode(data, stored, target, importance, devices)
    columns: dict[int, list[int]] = {}
    for row, column in protected:
        if start <= row < stop:
            columns.setdefault(row - start, []).append(column)
    written = encoded.data.copy() if columns else encoded.data
    for row, kept in columns.items():
        given = np.ones((1, entry.spec.cols), np.float32) if importance is None else importance[row : row + 1]
        weights = _protecting(given, kept, target.block_size)
        written[row] = transcode(data[row : row + 1], stored, target, weights).data[0]
    _check_finite(encoded.largest < np.inf, job, data)
    if encoded.largest > F16_MAX:
        _check_range(written, job)
    return written, encoded.loss, encoded.total


def _protecting(importance: np.ndarray, columns: Sequence[int], block: int) -> np.ndarray:
    """Importance [1, cols] of a row in which the protected weights outweigh all others of their blocks."""
    out = importance.copy()
    for column in columns:
        first = column // block * block
        of_block = float(importance[0, first : first + block].sum(dtype=np.float64))
        out[0, column] = PROTECTION * (of_block or 1.0)
    return out


def _check_range(data: np.ndarray, job: Job) -> None:
    """Weights beyond float16 fit types whose scales bridge the gap, and no others."""
    entry = job.entry
    if not np.isfinite(_decoded(data, entry.type)).all():
        raise UserError(
            f"{entry.name}: has weights too large for {entry.type}; "
            f"give it another type, e.g. rules=['{re.escape(entry.name)}=BF16']."
        )


def _decoded(data: np.ndarray, type: str) -> np.ndarray:
    """Rows of stored bytes as float32."""
    return np.asarray(dequantize(QuantizedTensor({"blocks": jnp.asarray(data)}, FORMATS[type])))


def _check_finite(finite: bool, job: Job, data: np.ndarray) -> None:
    if finite:
        return
    entry = job.entry
    x = _decoded(data, entry.source_type)
    row, col = np.argwhere(~np.isfinite(x))[0]
    index = (*np.unravel_index(job.start + row, entry.shape[:-1]), col)
    raise UserError(
        f"{entry.name}: the weight at {list(map(int, index))} is {x[row, col]}; the model is damaged. "
        "Download it again, or mend this tensor."
    )
