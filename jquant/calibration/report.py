"""What was measured of a model's inputs, as rows of a table, as JSON and as figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jquant.calibration._spikes import DENSE, SuperWeight
from jquant.core import OutputError, TensorSpec, UserError
from jquant.core.human import text_table
from jquant.io import check_target
from jquant.io.imatrix import Imatrix
from jquant.models import stage

ACTIVE = 1e-5  # mean square above which a channel counts as active, as in llama-imatrix --show-statistics

TOP = 3  # channels named in the table

FIGURES = ("importance", "channels", "concentration", "super_weights")


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
    return sorted(rows, key=lambda row: (row[0], stage(row[1][0]), row[1]))


def write_figures(
    folder: Path, imatrix: Imatrix, super_weights: Sequence[SuperWeight], specs: Mapping[str, TensorSpec]
) -> list[Path]:
    """The files written, PNG and SVG: each of FIGURES, super_weights only where ffn_down has any.

    specs: of the model.
    """
    from jquant.calibration import figures

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
            "--figures: figures are drawn by matplotlib, which is not installed: pip install matplotlib."
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
