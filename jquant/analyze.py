"""From a model and samples of text to an importance matrix, and what it says of each layer.

model = open_model(Path("SmolLM2-135M"))
samples = load_samples(model, "train.txt", samples=512, sequence_length=512)
imatrix = importance(model, samples)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from jquant import models
from jquant.calibrate import SECOND_MOMENTS, Progress, Stats, Store, collect
from jquant.convert import Model
from jquant.core import UserError
from jquant.gradients import FISHER, stream_gradients, text_labels
from jquant.io.checkpoint import Checkpoint
from jquant.io.imatrix import Imatrix
from jquant.io.samples import Samples, Text, read_text, sample
from jquant.io.token_ids import from_metadata
from jquant.models import Decoder
from jquant.text import text_table
from jquant.transforms.super_weights import (
    SuperWeight,
    find,
    harmful,
    most_sensitive,
    united,
    with_loss_changes,
)
from jquant.weights import Weights

ACTIVE = 1e-5  # mean square above which a channel counts as active, as in llama-imatrix --show-statistics
PROMPT = "Apple Inc. is a worldwide tech company."  # what Yu et al. 2024 search super weights on
LOSS_TOKENS = 512
CANDIDATES = 16  # weights that gradients point to, each of which costs a forward pass to verify
TOP = 3  # channels named in the table


def load_samples(
    model: Model,
    calibration: str | Text | None,
    *,
    samples: int,
    sequence_length: int,
    seed: int | None = None,
    parse_special: bool = False,
) -> Samples:
    """Samples of a text, tokenized as the model's own tokenizer does it.

    calibration: a text, or what `read_text` takes. Raises UserError for bad data.
    """
    template = model.metadata.get("tokenizer.chat_template")
    found = sample(
        calibration if isinstance(calibration, Text) else read_text(calibration),
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


def importance(
    model: Model,
    samples: Samples,
    *,
    batch: int = 4,
    store: Store | None = None,
    progress: Progress = lambda done, count: None,
) -> Imatrix:
    """The mean square of every input column of every matrix in the model's blocks.

    batch: samples on the device at a time. store: where activations lie between blocks; `open_checkpoint`
    makes one that continues an interrupted run.
    Raises UserError for a model whose forward pass is not known, and for inputs that are not finite.
    """
    decoder = models.decoder(Weights(model.source), model.metadata)
    stats = collect(
        decoder,
        samples.tokens,
        SECOND_MOMENTS,
        lengths=samples.lengths,
        batch=batch,
        store=store,
        progress=progress,
    )
    return imatrix_of(stats, samples)


def open_checkpoint(
    folder: Path, model: Model, samples: Samples, *, batch: int, resume: bool, method: str = "imatrix"
) -> Checkpoint:
    """A store in `folder` for `importance`, or another method's run, of the same arguments.

    Raises UserError where a checkpoint is there and `resume` is false, or it is of another run.
    """
    return Checkpoint(folder, run_of(model, samples, batch=batch, method=method), resume=resume)


def run_of(model: Model, samples: Samples, *, batch: int, method: str) -> dict[str, object]:
    """Everything that the result of a calibration depends on, as JSON values."""
    files = [file.stat() for file in model.files]
    return {
        "model": model.path.resolve().name,
        "model files": [[stat.st_size, stat.st_mtime_ns] for stat in files],
        "data": samples.dataset,
        "tokens": hashlib.sha256(samples.tokens.tobytes() + samples.lengths.tobytes()).hexdigest(),
        "samples": len(samples.tokens),
        "sequence length": samples.tokens.shape[1],
        "batch": batch,
        "method": method,
        "versions": {name: version(name) for name in ("jquant", "jax", "jaxlib")},
        "device": jax.devices()[0].device_kind,
    }


def super_weights(model: Model, samples: Samples) -> list[SuperWeight]:
    """Those that spike on a short prompt, those that gradients on some text point to where their removal does
    harm, and what the removal of each does to the loss on that text."""
    tokens = loss_tokens(samples)
    decoder = models.decoder(Weights(model.source), model.metadata)
    prompt = np.array([from_metadata(model.metadata).encode(PROMPT)])
    found = with_loss_changes(decoder, united(find(decoder, prompt), sensitive(decoder, tokens)), tokens)
    bad = harmful(found)
    return [w for w in found if "spike" in w.found_by or w in bad]


def sensitive(decoder: Decoder, tokens: np.ndarray, count: int = CANDIDATES) -> list[SuperWeight]:
    """The weights of all matrices whose removal is expected to raise the loss on some text most."""
    found: list[tuple[float, SuperWeight]] = []
    for block in stream_gradients(decoder, tokens, FISHER, text_labels):
        for name, stats in block.items():
            fisher = np.asarray(stats["fisher"])
            weight = decoder.tensors.tensor(name).reshape(fisher.shape)
            found += most_sensitive(name, fisher, weight, count)
        found = sorted(found, key=lambda item: -item[0])[:count]
    return [weight for _, weight in found]


def loss_tokens(samples: Samples) -> np.ndarray:
    """[1, t]: the longest sample, without its padding, for `super_weights` to measure the loss on.

    Raises UserError where it is too short for a loss.
    """
    longest = int(samples.lengths.argmax())
    length = min(LOSS_TOKENS, int(samples.lengths[longest]))
    if length < 2:
        raise UserError(
            f"{samples.dataset}: its longest sample has {length} tokens, and a loss needs 2; give more text."
        )
    return samples.tokens[longest : longest + 1, :length]


def super_weight_table(found: list[SuperWeight]) -> str:
    if not found:
        return (
            "No super weights: no down projection has a spike that one weight makes, and no weight that "
            "gradients point to is missed."
        )
    cells = [
        (
            str(w.block),
            f"{w.tensor}[{', '.join(map(str, w.place.at))}]",
            f"{w.value:.4g}",
            *("" if x is None else f"{x:.4g}" for x in (w.input, w.output)),
            "" if w.spike is None else f"{w.spike:.0f} ×",
            f"{w.loss_change:+.4f}",
            ", ".join(w.found_by),
        )
        for w in found
    ]
    header = ("block", "weight", "value", "input", "output", "spike", "loss without it", "found by")
    return text_table(header, cells, (0, 2, 3, 4, 5, 6))


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


@dataclass(frozen=True)
class Row:
    """What the inputs of matrices that share them are like."""

    block: int
    tensors: tuple[str, ...]  # "attn_q", …
    sum: float  # Σ of the mean squares
    active: float  # share of channels above ACTIVE
    entropy: float  # bits, of the distribution of importance over channels
    channels: int
    top: tuple[tuple[int, float], ...]  # (channel, share of the sum), largest first
    tokens: int  # that the least visited expert saw, or the only matrix


def rows(imatrix: Imatrix) -> list[Row]:
    """One row for each distinct input of each block, in order; experts are averaged."""
    found: dict[tuple[int, bytes], Row] = {}
    for name, entry in imatrix.entries.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.*)\.weight", name)
        if match is None:
            continue
        mean = entry.mean(0, dtype=np.float64)
        key = int(match[1]), mean.tobytes()
        if key in found:
            found[key] = _with_tensor(found[key], match[2])
        else:
            found[key] = _row(int(match[1]), match[2], mean, int(imatrix.counts[name].min()))
    return sorted(found.values(), key=lambda row: (row.block, row.tensors))


def _row(block: int, tensor: str, mean: np.ndarray, tokens: int) -> Row:
    total = float(mean.sum())
    share = mean / total if total > 0 else np.full_like(mean, 1 / mean.size)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    best = np.argsort(-share, kind="stable")[:TOP]
    return Row(
        block,
        (tensor,),
        total,
        float(np.mean(mean > ACTIVE)),
        float(-(share * logs).sum()),
        mean.size,
        tuple((int(i), float(share[i])) for i in best),
        tokens,
    )


def _with_tensor(row: Row, tensor: str) -> Row:
    return replace(row, tensors=tuple(sorted({*row.tensors, tensor})))


def table(found: list[Row]) -> str:
    """The rows as people read them."""
    cells = [
        (
            str(row.block),
            ", ".join(row.tensors),
            f"{row.sum:.4g}",
            f"{row.active:.1%}",
            f"{row.entropy:.2f} / {np.log2(row.channels):.2f}",
            "  ".join(f"{channel} ({share:.1%})" for channel, share in row.top),
        )
        for row in found
    ]
    header = ("block", "input of", "sum", "active", "entropy / most", "top channels (share)")
    return text_table(header, cells, (0, 2, 3, 4))


def as_json(found: list[Row] | list[SuperWeight]) -> list[dict[str, object]]:
    return [asdict(row) for row in found]
