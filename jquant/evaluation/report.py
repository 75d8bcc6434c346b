"""Figures of an evaluation as people and programs read them: a table, Markdown, CSV, JSON values."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jquant.core import TensorSpec
from jquant.core.human import human_size, text_table
from jquant.evaluation.coherence import Coherence
from jquant.evaluation.metrics import Accuracy, Estimate, Scores, Tokens
from jquant.plan.report import by_type


@dataclass(frozen=True)
class Row:
    """One file; the first row of a report is the original."""

    name: str
    path: str
    nbytes: int
    bpw: float
    specs: tuple[TensorSpec, ...]
    scores: Scores | None = None
    tokens: Tokens | None = None
    accuracy: Accuracy | None = None
    coherence: Coherence | None = None


def record(row: Row) -> dict[str, object]:
    """All figures of a row under flat names; a standard error is named after its figure, with "_se"."""
    out: dict[str, object] = {"file": row.name, "path": row.path, "bytes": row.nbytes}
    out["bpw"] = round(row.bpw, 4)
    s = row.scores
    if s is not None:
        out |= {"tokens": s.tokens, **_pair("perplexity", s.perplexity)}
        if s.kld is not None and s.quantiles is not None:
            out |= {**_pair("log_ppl_ratio", s.log_ratio), **_pair("kld_mean", s.kld), **s.quantiles}
            out |= {"kld_max": s.kld_max, **_pair("top1", s.top1)}
            out |= {**_pair("delta_p_mean", s.delta_p), **_pair("delta_p_rms", s.delta_p_rms)}
    if row.accuracy is not None:
        out["questions"] = row.accuracy.questions
        out |= _pair("accuracy", row.accuracy.plain) | _pair("accuracy_normalized", row.accuracy.normalized)
    if row.coherence is not None:
        out |= {"coherence": row.coherence.score, "coherent": row.coherence.passed}
        out |= {f"coherence_{part}": value for part, value in row.coherence.parts.items()}
    return out


def _pair(name: str, estimate: Estimate | None) -> dict[str, object]:
    return {} if estimate is None else {name: estimate.value, f"{name}_se": estimate.error}


def as_json(row: Row) -> dict[str, object]:
    """The record, with sizes by type, bits by block, and what was generated; infinities are null."""
    out = {name: _finite(value) for name, value in record(row).items()}
    out["types"] = [{"type": t, "tensors": n, "bytes": size} for t, n, size in by_type(row.specs)]
    out["bpw_by_block"] = [round(bits, 4) for bits in bits_by_block(row.specs)]
    if row.coherence is not None:
        out["check"] = row.coherence.report()
    return out


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def block_of(name: str) -> int | None:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


def bits_by_block(specs: Sequence[TensorSpec]) -> list[float]:
    """Bits per weight of block 0, 1, …; empty where tensors have other names than GGUF's."""
    sizes: dict[int, tuple[int, int]] = {}
    for spec in specs:
        block = block_of(spec.name)
        if block is not None:
            nbytes, size = sizes.get(block, (0, 0))
            sizes[block] = nbytes + spec.nbytes, size + spec.size
    return [8 * nbytes / size for _, (nbytes, size) in sorted(sizes.items())]


# Heading, and a row's cell: "" where there is no such figure.
_COLUMNS = {
    "file": lambda row: row.name,
    "size": lambda row: human_size(row.nbytes),
    "bpw": lambda row: f"{row.bpw:.2f}",
    "perplexity": lambda row: row.scores and _number(row.scores.perplexity),
    "mean KLD": lambda row: row.scores and _small(row.scores.kld),
    "median": lambda row: _quantile(row, "kld_median"),
    "99%": lambda row: _quantile(row, "kld_99"),
    "99.9%": lambda row: _quantile(row, "kld_999"),
    "top-1": lambda row: row.scores and _percent(row.scores.top1),
    "mean Δp": lambda row: row.scores and _percent(row.scores.delta_p, sign="+"),
    "RMS Δp": lambda row: row.scores and _percent(row.scores.delta_p_rms),
    "accuracy": lambda row: row.accuracy and _percent(row.accuracy.plain),
    "by length": lambda row: row.accuracy and _percent(row.accuracy.normalized),
    "coherence": lambda row: row.coherence and row.coherence.verdict,
}


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; columns that are empty in all rows are left out."""
    made = [[cell(row) or "" for row in rows] for cell in _COLUMNS.values()]
    kept = [i for i, column in enumerate(made) if any(column)]
    headings = list(_COLUMNS)
    return [headings[i] for i in kept], [[made[i][k] for i in kept] for k in range(len(rows))]


def table(rows: Sequence[Row]) -> str:
    headings, lines = cells(rows)
    return text_table(headings, lines, range(1, len(headings)))


def markdown(rows: Sequence[Row], caption: str) -> str:
    headings, lines = cells(rows)
    marks = ["-", *["-:"] * (len(headings) - 1)]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in [headings, marks, *lines]]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped) + f"\n\n{caption}\n"


def as_csv(rows: Sequence[Row]) -> str:
    """One line a file, every figure in full; empty where a file has no such figure."""
    records = [record(row) for row in rows]
    names = list(dict.fromkeys(name for one in records for name in one))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def caption(settings: Mapping[str, object]) -> str:
    """One line that says what the figures are of."""
    parts = [f"{settings['engine']}"]
    if "text" in settings:
        parts.append(
            f"{settings['text']}: {settings['chunks']} of {settings['chunks_in_text']} chunks of "
            f"{settings['context']} tokens, the second half of each scored; ± one standard error"
        )
    if "choices" in settings:
        parts.append(f"{settings['questions']} questions of {settings['choices']}")
    return "; ".join(parts) + "."


def _number(estimate: Estimate) -> str:
    value, error = estimate
    if value >= 1e6 or not math.isfinite(value):
        return f"{value:.3g}"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def _small(estimate: Estimate | None) -> str:
    """As many digits as the error has meaning in."""
    if estimate is None:
        return ""
    value, error = estimate
    if not math.isfinite(value) or not error > 0:
        return f"{value:.3g}"
    if value < 1e-3:
        return f"{value:.2e} ± {error:.0e}"
    digits = min(max(1 - math.floor(math.log10(error)), 2), 5)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _quantile(row: Row, name: str) -> str:
    quantiles = row.scores and row.scores.quantiles
    return f"{quantiles[name]:.3g}" if quantiles else ""


def _percent(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:{sign}.2f} ± {100 * estimate.error:.2f}%"
