"""From a model and samples of text to an importance matrix, and what it says of each layer.

model = open_model(Path("SmolLM2-135M"))
samples = load_samples(model, "train.txt", samples=512, sequence_length=512)
imatrix = importance(model, samples)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jquant import models
from jquant.between import Store
from jquant.calibrate import SECOND_MOMENTS, Progress, Stats, Through, collect
from jquant.convert import Model
from jquant.core import OutputError, TensorSpec, UserError
from jquant.io import check_target
from jquant.io.imatrix import Imatrix
from jquant.io.samples import Samples, Table, Text, read_texts, sample
from jquant.io.token_ids import from_metadata
from jquant.mesh import agree
from jquant.models import Decoder, Precision, WithHead
from jquant.parallel import over, shares
from jquant.shared_checkpoint import SharedCheckpoint
from jquant.team import ALONE, everyone
from jquant.text import text_table
from jquant.transforms.super_weights import DENSE, SuperWeight
from jquant.weights import Weights

ACTIVE = 1e-5  # mean square above which a channel counts as active, as in llama-imatrix --show-statistics
TOP = 3  # channels named in the table
FIGURES = ("importance", "channels", "concentration", "super_weights")


def load_samples(
    model: Model,
    calibration: str | Text | Table | Sequence[str] | None,
    *,
    samples: int,
    sequence_length: int,
    seed: int | None = None,
    parse_special: bool = False,
) -> Samples:
    """Samples of a text, tokenized as the model's own tokenizer does it.

    calibration: a text, a table, what `read_text` takes, or several of these for equal shares of each.
    Raises UserError for bad data.
    """
    template = model.metadata.get("tokenizer.chat_template")
    found = sample(
        calibration if isinstance(calibration, Text | Table) else read_texts(calibration),
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
    """
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
    decoder = models.decoder(Weights(model.source), model.metadata)
    return decoder.at(precision or _usual_precision())


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
        "precision": precision or _usual_precision(),
        "versions": {name: version(name) for name in ("jquant", "jax", "jaxlib")},
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
    agree({name: str(value) for name, value in run.items() if name != "model files"})  # and their times


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
    return [_row(*found) for found in _inputs(imatrix)]


def _inputs(imatrix: Imatrix) -> list[tuple[int, tuple[str, ...], np.ndarray, int]]:
    """(block, tensors, mean squares [channels], tokens) of each distinct input, in the order of the model."""
    found: dict[tuple[int, bytes], tuple[list[str], np.ndarray, int]] = {}
    for name, entry in imatrix.entries.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.*)\.weight", name)
        if match is None:
            continue
        mean = entry.mean(0, dtype=np.float64)
        tensors, _, _ = found.setdefault(
            (int(match[1]), mean.tobytes()), ([], mean, int(imatrix.counts[name].min()))
        )
        tensors.append(match[2])
    rows = [(block, tuple(sorted(t)), mean, tokens) for (block, _), (t, mean, tokens) in found.items()]
    return sorted(rows, key=lambda row: (row[0], _place(row[1][0]), row[1]))


def _place(tensor: str) -> tuple[bool, bool]:
    """Attention comes before the FFN, and in both what they are given before what they give."""
    return tensor.startswith("ffn"), tensor.startswith(("attn_output", "ffn_down"))


def write_figures(
    folder: Path, imatrix: Imatrix, super_weights: Sequence[SuperWeight], specs: Mapping[str, TensorSpec]
) -> list[Path]:
    """The files written, PNG and SVG: each of FIGURES, super_weights only where ffn_down has any.

    specs: of the model.
    """
    from jquant import figures

    inputs = {(block, ", ".join(tensors)): mean for block, tensors, mean, _ in _inputs(imatrix)}
    drawn = {
        "importance": figures.importance(inputs),
        "channels": figures.channels(inputs),
        "concentration": figures.concentration(inputs),
    }
    of_down = [w for w in super_weights if w.tensor == DENSE]
    if of_down:
        shapes = {
            int(match[1]): (spec.rows, spec.cols)
            for name, spec in specs.items()
            if (match := re.fullmatch(r"blk\.(\d+)\.ffn_down\.weight", name))
        }
        places = [(w.block, w.row, w.column, w.loss_change or 0.0) for w in of_down]
        drawn["super_weights"] = figures.super_weights(places, shapes)
    return [path for name, figure in drawn.items() for path in figures.save(figure, folder, name)]


def check_figures(folder: Path, *, force: bool) -> None:
    """Make the folder. Raises UserError where matplotlib is missing, or a figure is there and may not go."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "--figures: figures are drawn by matplotlib, which is not installed: pip install "
            "'jquant[figures]', or pip install matplotlib."
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); give another folder.") from None
    for name in FIGURES:
        for kind in ("png", "svg"):
            check_target(folder / f"{name}.{kind}", force=force)


def _row(block: int, tensors: tuple[str, ...], mean: np.ndarray, tokens: int) -> Row:
    total = float(mean.sum())
    share = mean / total if total > 0 else np.full_like(mean, 1 / mean.size)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    best = np.argsort(-share, kind="stable")[:TOP]
    return Row(
        block,
        tensors,
        total,
        float(np.mean(mean > ACTIVE)),
        float(-(share * logs).sum()),
        mean.size,
        tuple((int(i), float(share[i])) for i in best),
        tokens,
    )


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
