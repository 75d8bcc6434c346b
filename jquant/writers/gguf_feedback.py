"""A file fitted to the original on calibration text: error feedback while it is written, then tuning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jquant import models
from jquant.checkpoints.weights import Weights
from jquant.core import Metadata, Source, TensorSpec, UserError, output_name
from jquant.distributed.team import ALONE, Team, shares
from jquant.formats import FORMATS
from jquant.io import GgufSink
from jquant.io.imatrix import Imatrix
from jquant.io.write_errors import reporting
from jquant.ldlq import Forecast, forecast, sequential, tuning
from jquant.plan import Entry, Plan
from jquant.text.samples import Samples

PAYS_BELOW = 4.0  # bits a weight
ASIDE = 8  # one sample of so many is not learned from: it decides what tuning keeps


class Feedback(NamedTuple):
    """Error feedback on these samples: see `sequential`; then tuning on them: see `tuning`."""

    samples: Samples
    settings: sequential.Settings = sequential.Settings()
    batch: int = 4
    tuning: tuning.Settings | None = None  # None: the file stays as feedback leaves it
    progress: sequential.Progress = lambda done, count: None
    tuning_progress: tuning.Progress = lambda done, count, divergence: None
    announce: Callable[[Forecast], None] | None = None  # how long feedback will take, before it begins

    @property
    def aside(self) -> int:
        """Samples that tuning sets aside."""
        return 0 if self.tuning is None else -(-len(self.samples.tokens) // ASIDE)


def fed_entries(plan: Plan, protected: Mapping[str, Sequence[tuple[int, int]]]) -> list[Entry]:
    """The tensors that error feedback makes: matrices of blocks, and the output matrix, that change their
    type."""
    output = output_name([entry.name for entry in plan.entries])
    return [
        entry
        for entry in plan.entries
        if (entry.name == output or entry.name.startswith("blk."))
        and entry.name.endswith(".weight")
        and len(entry.shape) > 1
        and entry.type != entry.source_type
        and FORMATS[entry.type].block_size > 1
        and entry.name not in protected
    ]


def pays(plan: Plan, protected: Mapping[str, Sequence[tuple[int, int]]]) -> bool:
    """Whether error feedback has matrices to make of types so small that it is worth its time."""
    return any(FORMATS[entry.type].bpw < PAYS_BELOW for entry in fed_entries(plan, protected))


def check_importance(
    plan: Plan, protected: Mapping[str, Sequence[tuple[int, int]]], imatrix: Imatrix | None
) -> None:
    """Raise UserError where a tensor that error feedback leaves alone needs importance that is not there."""
    fed = {entry.name for entry in fed_entries(plan, protected)}
    entries = {} if imatrix is None else imatrix.entries
    for entry in plan.entries:
        rest = entry.name not in fed and entry.name not in entries and entry.type != entry.source_type
        if rest and FORMATS[entry.type].needs_importance:
            raise UserError(
                f"{entry.name}: {entry.type} needs importance, and feedback= does not make it; "
                f"add imatrix=FILE or analyze=True, or give it another type: rules=['^{entry.name}$=Q4_K']."
            )


def feed_back(
    source: Source,
    metadata: Metadata,
    entries: Sequence[Entry],
    sink: GgufSink | None,
    feedback: Feedback,
    threads: int,
    team: Team = ALONE,
) -> dict[str, sequential.Fed]:
    """Write these tensors of a model.

    sink: of the first process of the team; the others have none. Each learns from a part of the samples.
    """
    if feedback.aside >= len(feedback.samples.tokens):
        raise UserError("tuning needs two samples or more: one to learn from, one to judge; got 1.")
    finished: set[str] = set(json.loads(team.told(json.dumps(sink.finished() if sink else []))))
    found: dict[str, sequential.Fed] = {}
    learned = len(feedback.samples.tokens) - feedback.aside
    mine = shares(learned, team.me, team.count)
    model, tokens = models.decoder(Weights(source), metadata), feedback.samples.tokens[mine]
    formats = {entry.name: FORMATS[entry.type] for entry in entries}
    if feedback.announce is not None and not formats.keys() <= finished:
        feedback.announce(forecast(model, tokens, formats, head=model, batch=feedback.batch, threads=threads))

    places = {entry.name: _bytes_of(entry) for entry in entries}

    def earlier(name: str) -> np.ndarray | None:
        if name not in finished:
            return None
        own = np.zeros(places[name], np.uint8) if sink is None else sink.read(name)
        return np.asarray(team.sum(own))

    blocks = sequential.feed_back(
        model,
        tokens,
        formats,
        head=model,
        lengths=feedback.samples.lengths[mine],
        settings=feedback.settings,
        earlier=earlier,
        batch=feedback.batch,
        threads=threads,
        team=team,
        progress=feedback.progress,
    )
    for block in blocks:
        for name, fed in block.items():
            if sink is not None and name not in finished:
                sink.write(name, 0, fed.data)
                sink.finish(name)
            found[name] = fed._replace(data=fed.data[:0])
    return found


def _bytes_of(entry: Entry) -> tuple[int, int]:
    """The shape of a tensor's bytes: rows, bytes of a row."""
    format, (*rows, cols) = FORMATS[entry.type], entry.shape
    return math.prod(rows), cols // format.block_size * format.block_bytes


def tune(
    source: Source,
    metadata: Metadata,
    layout: Sequence[TensorSpec],
    sink: GgufSink,
    feedback: Feedback,
    fingerprint: str,
) -> tuning.Gain:
    """Tune the file in the sink, all of whose tensors are finished, towards the model.

    What is to change is kept beside the partial file before the first byte of it changes, so that a run
    killed in between continues from there.
    """
    assert feedback.tuning is not None
    file = _Finished({spec.name: spec for spec in layout}, sink)
    original, quantized = (models.decoder(Weights(one), metadata) for one in (source, file))
    kept = _beside(sink.path)
    tuned = _read(kept, fingerprint)
    if tuned is None:
        samples = feedback.samples
        tuned = tuning.tune(
            original,
            quantized,
            file,
            samples.tokens,
            aside=feedback.aside,
            lengths=samples.lengths,
            settings=feedback.tuning,
            progress=feedback.tuning_progress,
        )
        _keep(kept, fingerprint, tuned)
    if tuned.numbers:
        for name, data in tuning.apply(tuned.numbers, quantized, file):
            sink.rewrite(name, data)
    return tuned.gain


def forget(out: Path) -> None:
    """What was kept for a resumed run."""
    _beside(out).unlink(missing_ok=True)


def _beside(out: Path) -> Path:
    return out.with_name(out.name + ".partial.tuned")


@dataclass(frozen=True)
class _Finished:
    """The tensors in a sink, as a Source."""

    specs: Mapping[str, TensorSpec]
    sink: GgufSink

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.sink.read(name, start, stop)


def _keep(path: Path, fingerprint: str, tuned: tuning.Tuned) -> None:
    tensors = {f"{name}#{i}": a for name, own in tuned.numbers.items() for i, a in enumerate(own)}
    about = {"fingerprint": fingerprint, "before": repr(tuned.gain.before), "after": repr(tuned.gain.after)}
    half = path.with_name(path.name + ".half")
    with reporting(path):
        save_file(tensors, half, about)
        half.replace(path)


def _read(path: Path, fingerprint: str) -> tuning.Tuned | None:
    """What an interrupted run of the same kind had found."""
    if not path.exists():
        return None
    numbers: tuning.Numbers = {}
    with safe_open(path, "numpy") as file:
        about = file.metadata() or {}
        if about.get("fingerprint") != fingerprint:
            return None
        for key in sorted(file.keys()):
            name = key.rpartition("#")[0]
            numbers[name] = (*numbers.get(name, ()), file.get_tensor(key))
    return tuning.Tuned(tuning.Gain(float(about["before"]), float(about["after"])), numbers)
