"""From a model to a GGUF file on disk: what `jquant quantize` and a script call.

model = open_model(Path("SmolLM2-135M"))
plan_ = plan(model.source.specs, model.metadata, "Q4_K_M")
write_gguf(model, plan_, Path("smol-q4.gguf"))

Several processes that share the output's folder all call it with the same arguments. Rows are spread over
them by what they cost. Each writes its own where they belong in the partial file that process 0 has made,
with a journal of its own; process 0 checks that nothing is missing and commits. The bytes are those of one
process. After a kill, any number of processes continues with what is whole.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jquant.checkpoints import LOW_BPW
from jquant.checkpoints.fingerprint import common_facts, digest, digest_of_arrays, fingerprint
from jquant.checkpoints.model import Model
from jquant.core import Effort, Rows, UserError
from jquant.distributed.mesh import SharedError, agree, exchange, is_first, local_devices
from jquant.distributed.team import everyone
from jquant.io import GgufPart, GgufSink, headers_digest
from jquant.io.imatrix import Imatrix
from jquant.ldlq import sequential, tuning
from jquant.plan import Plan
from jquant.plan.header import digest as imatrix_digest
from jquant.plan.header import output_metadata
from jquant.writers import gguf_feedback as fitting
from jquant.writers._loop import Progress, relative_errors, run
from jquant.writers._spread import portion
from jquant.writers.gguf_feedback import Feedback


class Written(NamedTuple):
    paths: list[Path]
    # Relative error by tensor, see pipeline.relative_errors; with feedback that of the output. Not of tensors
    # that an interrupted run had begun.
    errors: dict[str, float]
    fed: dict[str, sequential.Fed]  # tensors that error feedback made, without their bytes
    tuned: tuning.Gain | None = None  # where the file was tuned


def low_errors(plan: Plan, fed: Mapping[str, sequential.Fed]) -> dict[str, float]:
    """The errors that error feedback left in tensors of few bits, where they are known."""
    low = {entry.name for entry in plan.entries if entry.bpw <= LOW_BPW}
    return {name: f.error for name, f in fed.items() if name in low and math.isfinite(f.error)}


def importance_of(model: Model, imatrix: Imatrix | None, name: str) -> dict[str, np.ndarray]:
    """The imatrix's entries for the tensors of this model: float32 [matrices, cols] each."""
    if imatrix is None:
        return {}
    found = imatrix.by_tensor(model.source.specs.values())
    if not found:
        example = next(iter(imatrix.entries), "nothing")
        raise UserError(
            f"{name}: none of its {len(imatrix.entries)} tensors ({example}, …) is in {model.path}; "
            "this imatrix was made from another model."
        )
    return found


def facts(
    model: Model,
    plan: Plan,
    imatrix: Imatrix | None,
    protected: Mapping[str, Sequence[tuple[int, int]]],
    effort: Effort,
    feedback: Feedback | None = None,
) -> dict[str, str]:
    """What the bytes depend on, by name: alike wherever copies of the same files are quantized alike."""
    kept = sorted((name, sorted(positions)) for name, positions in protected.items())
    found = {**common_facts(model), "plan": digest([plan.to_json().encode()]), "effort": effort}
    if kept:
        found["protected weights"] = digest([str(kept).encode()])
    if feedback is not None:
        arrays = digest_of_arrays((feedback.samples.tokens, feedback.samples.lengths))
        options = f"{feedback.settings} {feedback.batch} {feedback.tuning} {arrays}"
        found["feedback"] = digest([options.encode()])
    if imatrix is not None:
        found["imatrix"] = imatrix_digest(imatrix)
    return found


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
    """Write the planned file, or its shards.

    The file appears under its final name when it is complete. A run that was killed leaves `OUT.partial`,
    which `resume` continues; the result has the same bytes as an undisturbed run.
    feedback: the matrices of the model's blocks are quantized with error feedback, but those with protected
    weights; all others as without. Where it says so, the whole file is then tuned. Of several processes, each
    has a part of its samples and codes a part of the rows of every matrix; sums are in another order than in
    one, so bytes may differ from its. progress: of this process's share.

    Raises OutputError where the output cannot be written, UserError where the input cannot be used, and in
    all processes where they differ in version, model, options or anything else that the bytes depend on,
    where one of them fails, and for tuning, which is of one process.
    """
    importance = importance_of(model, imatrix, imatrix_name)
    metadata = output_metadata(model.metadata, plan, imatrix, imatrix_name, recipe=recipe)
    team, tunes = everyone(), feedback is not None and feedback.tuning is not None
    if tunes and team.count > 1:
        raise SharedError("tuning runs in one process: leave --effort best, or --feedback, away.")
    known = facts(model, plan, imatrix, protected or {}, effort, feedback)
    header = headers_digest(out, metadata, plan.layout(), max_shard_bytes)
    agree(known | {"output": out.name, "header": header, "resume": str(resume)})
    made_of = fingerprint(model, known)

    with contextlib.ExitStack() as opened:
        sink = None
        if is_first():
            sink = GgufSink(
                out,
                metadata,
                plan.layout(),
                max_shard_bytes=max_shard_bytes,
                resume=resume,
                fingerprint=made_of,
                force=force,
            )
            opened.callback(sink.close)
        renaming = json.loads(team.told(json.dumps(sink is not None and sink.renaming)))
        fed = {}
        if feedback is not None and not renaming:
            entries = fitting.fed_entries(plan, protected or {})
            fed = fitting.feed_back(model.source, model.metadata, entries, sink, feedback, threads, team)
        begun = json.dumps([made_of, sink.left()] if sink is not None else [])
        first_made_of, remaining = json.loads(team.told(begun))
        left, entries = [Rows(*one) for one in remaining], {entry.name: entry for entry in plan.entries}
        mine = portion(left, entries, team.count, team.me)
        target = sink
        if target is None and mine:
            target = GgufPart(
                out,
                metadata,
                plan.layout(),
                team.me,
                max_shard_bytes=max_shard_bytes,
                fingerprint=first_made_of,
            )
            opened.callback(target.close)
        losses = {}
        if target is not None:
            losses = run(
                model.source,
                plan,
                target,
                mine,
                importance=importance,
                protected=protected,
                effort=effort,
                threads=threads,
                devices=local_devices(),
                progress=progress,
            )
        if isinstance(target, GgufPart):
            target.close()
        # Of what an interrupted run had begun, the error of the rest says nothing.
        whole = {rows.name for rows in left if rows.stop - rows.start == entries[rows.name].spec.rows}
        of_all = [json.loads(text) for text in exchange(json.dumps(losses))]
        errors = relative_errors([{name: (loss, total) for name, (loss, total) in o.items()} for o in of_all])
        errors = {name: error for name, error in errors.items() if name in whole}
        tuned, paths = None, list[Path]()
        if sink is not None:
            sink.adopt_parts()
            if feedback is not None and tunes and not renaming:
                tuned = fitting.tune(model.source, model.metadata, plan.layout(), sink, feedback, made_of)
            sink.commit()
            fitting.forget(out)
            paths = sink.paths
        paths = json.loads(team.told(json.dumps([str(path) for path in paths])))
        return Written([Path(path) for path in paths], errors | low_errors(plan, fed), fed, tuned)
