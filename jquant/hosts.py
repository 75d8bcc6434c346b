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

from jquant import fitting
from jquant.convert import Model, Written, facts, fingerprint, importance_of, low_errors, output_metadata
from jquant.core import Effort
from jquant.fitting import Feedback
from jquant.formats import FORMATS
from jquant.io import GgufPart, GgufSink, headers_digest
from jquant.io.imatrix import Imatrix
from jquant.mesh import SharedError, agree, exchange, is_first, local_devices
from jquant.pipeline import Progress, run
from jquant.plan import Entry, Plan
from jquant.team import everyone

# Per weight, relative to a copy. Measured on one core, in ns a weight: copies and casts 0.5 to 3, searches of
# scales 10 to 40, of codebooks 20 to 80.
COPIED, SEARCHED, CODEBOOK = 1, 20, 40


def cost(entry: Entry) -> int:
    """What it takes to make a tensor, in weights that are merely copied."""
    format = FORMATS[entry.type]
    if entry.type == entry.source_type or format.block_size == 1:
        return COPIED * entry.size
    return entry.size * (CODEBOOK if format.group_size > 1 else SEARCHED)


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
    feedback: Feedback | None = None,
    max_shard_bytes: int | None = None,
    threads: int = 2,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda name, done: None,
) -> Written:
    """Arguments, result and errors of `convert.write_gguf`; all processes call it with the same.

    progress: of this process's share. feedback: each process has a part of its samples and codes a part of
    the rows of every matrix; sums are in another order than in one process, so bytes may differ from its.
    Raises UserError, in all processes, where they differ in version, model, options or anything else that the
    bytes depend on, where one of them fails, and for tuning, which is of one process.
    """
    importance = importance_of(model, imatrix, imatrix_name)
    metadata = output_metadata(model, plan, imatrix, imatrix_name, recipe=recipe)
    if feedback is not None and feedback.tuning is not None:
        raise SharedError("tuning runs in one process: leave --effort best, or --feedback, away.")
    known = facts(model, plan, imatrix, protected or {}, effort, feedback)
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
        fed = {}
        team = everyone()
        if feedback is not None and not json.loads(team.told(json.dumps(bool(sink and sink.renaming)))):
            entries = fitting.fed_entries(plan, protected or {})
            fed = fitting.feed_back(model.source, model.metadata, entries, sink, feedback, threads, team)
        if sink is not None:
            begun = json.dumps({"fingerprint": fingerprint(model, known), "finished": sink.finished()})
        begun = json.loads(team.told(begun))
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
        paths = json.loads(team.told(json.dumps(paths)))
        return Written([Path(path) for path in paths], errors | low_errors(plan, fed), fed)
    finally:
        for opened in (sink, part):
            if opened is not None:
                opened.close()
