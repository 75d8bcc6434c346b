"""Folders by several processes that share the output's: `folders.write_folder`, by all of them.

As `hosts` for GGUF: weights are spread by what they cost, each process writes its own into the files that
process 0 has made, and process 0 checks that nothing is missing and commits. The bytes are those of one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

import jax

from jquant.convert import fingerprint
from jquant.folders import (
    NOTHING,
    Checkpoint,
    FedWeight,
    FolderPlan,
    Ingredients,
    Progress,
    WrittenFolder,
    facts,
    left,
    open_sink,
    write_fed,
    write_input_scales,
    write_weights,
)
from jquant.hosts import COPIED, SEARCHED, spread
from jquant.io import FolderPart
from jquant.mesh import agree, exchange, is_first
from jquant.team import everyone


def write_folder(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    out: Path,
    made: Ingredients = NOTHING,
    *,
    fed: Iterable[FedWeight] | None = None,
    max_shard_bytes: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda name, done: None,
) -> WrittenFolder:
    """Arguments, result and errors of `folders.write_folder`; all processes call it with the same.

    fed: the same in all, see `folder_feedback`. progress: of this process's share.
    Raises UserError, in all processes, where they differ in anything that the bytes depend on, or one fails.
    """
    known = facts(checkpoint, plan, made, fed=fed is not None)
    agree(known | {"output": out.name, "shards": str(max_shard_bytes), "resume": str(resume)})
    name, team, begun = fingerprint(checkpoint.model, known), everyone(), ""
    with contextlib.ExitStack() as opened:
        sink = None
        if is_first():
            sink = open_sink(
                checkpoint,
                plan,
                out,
                max_shard_bytes=max_shard_bytes,
                resume=resume,
                fingerprint=name,
                force=force,
            )
            opened.callback(sink.close)
            write_input_scales(checkpoint, made.input_scales, sink)
            errors = write_fed(checkpoint, plan, fed or (), sink, progress)
            rest = left(checkpoint, plan, sink.finished(), errors)
            begun = json.dumps([name, sink.finished(), [spec.name for spec in rest]])
        else:
            errors = {one.name: one.error for one in fed or ()}  # computed by all, written by the first
        name, finished, rest = json.loads(team.told(begun))
        specs, chosen = [checkpoint.source.specs[one] for one in rest], set(plan.quantized)
        # In numbers that are merely copied.
        costs = [spec.size * (SEARCHED if spec.name in chosen else COPIED) for spec in specs]
        mine = [specs[i] for i in spread(costs, jax.process_count())[jax.process_index()]]
        if sink is not None:
            errors |= write_weights(checkpoint, plan, mine, sink, made, progress)
        elif mine:
            part = FolderPart(
                out,
                plan.layout,
                jax.process_index(),
                finished=finished,
                max_shard_bytes=max_shard_bytes,
                fingerprint=name,
            )
            with part:
                errors |= write_weights(checkpoint, plan, mine, part, made, progress)
        told = exchange(json.dumps(errors))
        if sink is not None:
            sink.adopt_parts()
            sink.commit()
    exchange()
    return WrittenFolder(sorted(out.iterdir()), {k: v for text in told for k, v in json.loads(text).items()})
