"""Quantization by several processes that share the output's folder: `convert.write_gguf`, by all of them.

Tensors are spread over the processes by what they cost. Each writes its own where they belong in the partial
file that process 0 has made, with a journal of its own; process 0 checks that nothing is missing and commits.
The bytes are those of one process. After a kill, any number of processes continues with what is whole.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from jquant.convert import Model, Written, facts, fingerprint, importance_of, output_metadata
from jquant.core import Effort
from jquant.formats import FORMATS
from jquant.io import GgufPart, GgufSink, headers_digest
from jquant.io.imatrix import Imatrix
from jquant.mesh import agree, exchange, is_first, local_devices
from jquant.pipeline import Progress, run
from jquant.plan import Entry, Plan

# Per weight, relative to a copy. Measured on one core, in ns a weight: copies and casts 0.5 to 3, searches of
# scales 10 to 40, of codebooks 20 to 80.
_COPIED, _SEARCHED, _CODEBOOK = 1, 20, 40


def cost(entry: Entry) -> int:
    """What it takes to make a tensor, in weights that are merely copied."""
    format = FORMATS[entry.type]
    if entry.type == entry.source_type or format.block_size == 1:
        return _COPIED * entry.size
    return entry.size * (_CODEBOOK if format.group_size > 1 else _SEARCHED)


def spread(costs: Sequence[int], shares: int) -> list[list[int]]:
    """Indices of the costs in so many shares of nearly the same sum: the largest first, each to the least."""
    found: list[list[int]] = [[] for _ in range(shares)]
    least = [(0, share) for share in range(shares)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, share = heapq.heappop(least)
        found[share].append(index)
        heapq.heappush(least, (total + costs[index], share))
    return [sorted(share) for share in found]


def write_gguf(
    model: Model,
    plan: Plan,
    out: Path,
    *,
    imatrix: Imatrix | None = None,
    imatrix_name: str = "",
    protected: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    recipe: str = "",
    effort: Effort = "fast",
    max_shard_bytes: int | None = None,
    threads: int = 2,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda name, done: None,
) -> Written:
    """Arguments, result and errors of `convert.write_gguf`; all processes call it with the same.

    progress: of this process's share. Raises UserError, in all processes, where they differ in version,
    model, options or anything else that the bytes depend on, and where one of them fails.
    """
    importance = importance_of(model, imatrix, imatrix_name)
    metadata = output_metadata(model, plan, imatrix, imatrix_name, recipe=recipe)
    known = facts(model, plan, imatrix, protected or {}, effort)
    header = headers_digest(out, metadata, plan.layout(), max_shard_bytes)
    agree(known | {"output": out.name, "header": header, "resume": str(resume)})

    sink = part = None
    try:
        begun = ""
        if is_first():
            sink = GgufSink(
                out,
                metadata,
                plan.layout(),
                max_shard_bytes=max_shard_bytes,
                resume=resume,
                fingerprint=fingerprint(model, known),
                force=force,
            )
            begun = json.dumps({"fingerprint": fingerprint(model, known), "finished": sink.finished()})
        begun = json.loads(exchange(begun)[0])
        finished = set(begun["finished"])
        left = [entry for entry in plan.entries if entry.name not in finished]
        mine = spread([cost(entry) for entry in left], jax.process_count())[jax.process_index()]
        share = replace(plan, entries=tuple(left[i] for i in mine))
        if sink is None and share.entries:
            part = GgufPart(
                out,
                metadata,
                plan.layout(),
                jax.process_index(),
                finished=begun["finished"],
                max_shard_bytes=max_shard_bytes,
                fingerprint=begun["fingerprint"],
            )
        errors = {}
        target = sink or part
        if target is not None:
            errors = run(
                model.source,
                share,
                target,
                importance=importance,
                protected=protected,
                effort=effort,
                threads=threads,
                devices=local_devices(),
                progress=progress,
            )
        if part is not None:
            part.close()
        errors = {name: e for told in exchange(json.dumps(errors)) for name, e in json.loads(told).items()}
        paths: list[str] = []
        if sink is not None:
            sink.adopt_parts()
            sink.commit()
            paths = [str(path) for path in sink.paths]
        paths = json.loads(exchange(json.dumps(paths))[0])
        return Written([Path(path) for path in paths], errors, {})
    finally:
        for opened in (sink, part):
            if opened is not None:
                opened.close()
