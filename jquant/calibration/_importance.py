"""From a model and samples of text to an importance matrix, and what it says of each layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from jquant.calibration._calibrators import SECOND_MOMENTS, Stats
from jquant.calibration._collect import Through, collect
from jquant.calibration._walk import Progress
from jquant.calibration.activations import Store
from jquant.calibration.resume import SharedCheckpoint
from jquant.calibration.sharded import over
from jquant.checkpoints.fingerprint import common_facts, digest_of_arrays, times_of
from jquant.checkpoints.model import AnyModel, Model, opened
from jquant.distributed.mesh import agree
from jquant.distributed.team import ALONE, everyone, shares
from jquant.io.imatrix import Imatrix
from jquant.models import Decoder, Precision, WithHead
from jquant.text.samples import Samples, Table, Text, read_texts, sample
from jquant.text.token_ids import from_metadata

_NAMED = 8  # experts in a note
# A file, a name or a dataset of the hub, or what was read of one.
Calibration: TypeAlias = str | os.PathLike[str] | Text | Table


def load_samples(
    model: AnyModel,
    calibration: Calibration | Sequence[Calibration] | None = None,
    *,
    samples: int = 512,
    sequence_length: int = 512,
    seed: int | None = None,
    parse_special: bool = False,
) -> Samples:
    """Samples of a text, tokenized as the model's own tokenizer does it: tokens [samples, sequence_length].

    calibration: a file of text, JSON lines or parquet; a dataset on the hub, "org/name:config:split";
    "wikitext2", "pydoc", "python" (source code); or several of these for equal shares of each. None: python,
    and wikitext2 or else pydoc. samples: at most so many, the first ones, or with a seed ones chosen at
    random. sequence_length: tokens of each. parse_special: texts of special tokens are read as these.
    What is to be said of the text is in `remarks`. Raises UserError for bad data.

    >>> samples = jquant.load_samples(model, text, samples=4, sequence_length=32)
    >>> samples.tokens.shape
    (4, 32)
    """
    for name, value, least in (("samples", samples, 1), ("sequence_length", sequence_length, 2)):
        if value < least:
            raise ValueError(f"{name}={value}: needs to be {least} or more.")
    model = opened(model)
    template = model.metadata.get("tokenizer.chat_template")
    found = sample(
        _texts(calibration),
        from_metadata(model.metadata),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        parse_special=parse_special,
        chat_template=template if isinstance(template, str) else None,
    )
    context = model.metadata.get(f"{model.metadata.get('general.architecture')}.context_length")
    if isinstance(context, np.integer) and sequence_length > context:
        remark = f"the model was made for texts of {context} tokens; samples have {sequence_length}."
        return replace(found, remarks=(*found.remarks, remark))
    return found


def _texts(calibration: Calibration | Sequence[Calibration] | None) -> list[Text | Table]:
    if calibration is None:
        return read_texts(None)
    several = [calibration] if isinstance(calibration, str | os.PathLike | Text | Table) else calibration
    found: list[Text | Table] = []
    for one in several:
        found += [one] if isinstance(one, Text | Table) else read_texts(os.fspath(one))
    return found or read_texts(None)


def importance(
    model: AnyModel,
    samples: Samples,
    *,
    batch: int = 4,
    store: Store | None = None,
    mesh: Mesh | None = None,
    precision: Precision | None = None,
    progress: Progress = lambda done, count: None,
) -> Imatrix:
    """The mean square of every input column of every matrix in the model's blocks, and of the output matrix,
    which llama-imatrix leaves out (`--process-output` adds it there, where it is a tensor of its own).

    mesh: over which samples and weights are spread, see `parallel`; default: one device of one process. With
    several processes all call this with the same samples, run their share, and have the whole result.
    batch: samples on a device at a time. store: where activations lie between blocks; `open_checkpoint`
    makes one that continues an interrupted run. precision: see `decoder_for`.
    Raises UserError for a model whose forward pass is not known, and for inputs that are not finite.

    >>> imatrix = jquant.importance(model, samples)
    >>> imatrix.entries["blk.0.ffn_down.weight"].shape  # [matrices, columns]
    (1, 96)
    >>> imatrix.write(out / "importance.gguf")
    """
    model = opened(model)
    decoder = decoder_for(model, precision)
    if mesh is not None:
        agree_on(model, samples, batch=batch, method="imatrix", precision=precision)
    mine, through = share_of(samples, mesh)
    whole, count = WithHead(decoder), len(decoder.blocks)
    stats = collect(
        whole,
        samples.tokens[mine],
        SECOND_MOMENTS,
        lengths=samples.lengths[mine],
        batch=batch,
        store=store,
        through=through,
        progress=lambda done, _: progress(done, count) if done <= count else None,
    )
    stats[decoder.output_name] = stats.pop(whole.output_place)
    return imatrix_of(stats, samples)


def decoder_for(model: Model, precision: Precision | None) -> Decoder:
    """The model to calibrate with. precision: of products; default: what the device has matrix units for,
    bfloat16 on accelerators, float32 on a CPU."""
    return model.decoder().at(precision or _usual_precision())


def _usual_precision() -> Precision:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def share_of(samples: Samples, mesh: Mesh | None) -> tuple[slice, Through | None]:
    """This process's samples, and how they go through a block."""
    if mesh is None:
        return slice(None), None
    mine = shares(len(samples.tokens), jax.process_index(), jax.process_count())
    return mine, over(mesh, mine.start)


def open_checkpoint(
    folder: Path,
    model: Model,
    samples: Samples,
    *,
    batch: int,
    resume: bool,
    method: str = "imatrix",
    mesh: Mesh | None = None,
    precision: Precision | None = None,
) -> SharedCheckpoint:
    """A store in `folder` for `importance`, or another method's run, of the same arguments.

    Another mesh, and another number of processes, may continue: its sums differ in their last digits. Of
    several processes, all call this, and have agreed on what they measure.
    Raises UserError where a checkpoint is there and `resume` is false, or it is of another run.
    """
    run = run_of(model, samples, batch=batch, method=method, precision=precision)
    team = ALONE if mesh is None else everyone()
    mine, _ = share_of(samples, mesh)
    return SharedCheckpoint(folder, run, resume=resume, samples=len(samples.tokens), mine=mine, team=team)


def run_of(
    model: Model, samples: Samples, *, batch: int, method: str, precision: Precision | None = None
) -> dict[str, object]:
    """Everything that the result of a calibration depends on, as JSON values."""
    return {
        **common_facts(model),
        "times of files": times_of(model),
        "data": samples.dataset,
        "tokens": digest_of_arrays((samples.tokens, samples.lengths)),
        "samples": len(samples.tokens),
        "sequence length": samples.tokens.shape[1],
        "batch": batch,
        "method": method,
        "precision": precision or _usual_precision(),
        "device": jax.devices()[0].device_kind,
    }


def agree_on(
    model: Model,
    samples: Samples,
    *,
    batch: int,
    method: str,
    precision: Precision | None = None,
    **more: str,
) -> None:
    """Raise UserError where processes are to measure different things, or differ in anything more."""
    run = run_of(model, samples, batch=batch, method=method, precision=precision) | more
    agree({name: str(value) for name, value in run.items() if name != "times of files"})


def imatrix_of(stats: Mapping[str, Stats], samples: Samples) -> Imatrix:
    """Second moments as an imatrix.

    An expert that no or one token reached gets the mean of its stack, with the weight of one token: the same
    inputs go to all experts, so that is the best guess. `unreached` lists them.
    """
    entries, counts = {}, {}
    for name, s in stats.items():
        sums = np.atleast_2d(np.asarray(s["sum2"], np.float32))  # [n_mat, ne0]
        count = np.asarray(s["count"], np.float32).reshape(-1)
        mean = sums.sum(0, dtype=np.float64) / max(count.sum(), 1)
        seen = count[:, None] > 1
        entries[name] = np.where(seen, sums / np.maximum(count, 1)[:, None], mean).astype(np.float32)
        counts[name] = np.maximum(count, 1)
    return Imatrix(entries, counts, [samples.dataset], len(samples.tokens), samples.tokens.shape[1])


def unreached(imatrix: Imatrix) -> dict[str, list[int]]:
    """Experts whose entry is a guess: those that are counted once."""
    return {
        name: np.flatnonzero(count <= 1).tolist()
        for name, count in imatrix.counts.items()
        if len(count) > 1 and (count <= 1).any()
    }


def unreached_notes(guessed: Mapping[str, Sequence[int]]) -> list[str]:
    """What the user should know of the experts of `unreached`."""
    return [
        f"{tensor}: no or one token for experts {_few(experts)}; they have their stack's mean."
        for tensor, experts in guessed.items()
    ]


def _few(experts: Sequence[int]) -> str:
    more = f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else ""
    return f"{list(experts[:_NAMED])}{more}"
