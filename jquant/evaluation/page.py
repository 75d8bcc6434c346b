"""An evaluation as one HTML page that needs nothing beside it: tables, figures in SVG, what was generated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from jquant.core import TensorSpec
from jquant.core.human import human_size
from jquant.evaluation import _svg as svg
from jquant.evaluation.report import Row, block_of, caption, cells
from jquant.plan.report import by_type

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--faint:#d9dde2;--page:#fff;
--c0:#2f6fb5;--c1:#c8552b;--c2:#3a8f5c;--c3:#8b5bb5;--c4:#b58a1c;--c5:#2a9aa8;--c6:#b5497d;--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--faint:#3a4048;--page:#16191d;
--c0:#6aa5e8;--c1:#ef8a5f;--c2:#6cc48f;--c3:#b992e0;--c4:#dcb554;--c5:#5cc5d2;--c6:#e285b2;--c7:#9ca3af}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);
max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--faint);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
figure{margin:0;max-width:44rem}svg{width:100%;height:auto}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
figcaption,.note{opacity:.8;font-size:.9rem}pre{white-space:pre-wrap;font-size:.85rem;margin:.2rem 0 .8rem}
"""
_CURVE = 200  # points of a distribution
_CONTROL = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # no part of a page


def page(rows: Sequence[Row], settings: Mapping[str, object]) -> str:
    """rows: the original, then the candidates."""
    candidates = [row for row in rows[1:] if row.scores and row.scores.kld]
    parts = [f"<h1>{escape(rows[0].name)} and {_count(len(rows) - 1)}</h1>", _table(*cells(rows))]
    parts.append(f'<p class="note">{escape(caption(settings))}</p>')
    if candidates:
        parts += ["<h2>Divergence, token by token</h2>", _distribution(candidates)]
        parts += ["<h2>Size and quality</h2>", _sizes(candidates)]
    parts += ["<h2>Size by type</h2>", _types(rows)]
    for row in rows[1:] or rows:
        shown = _bits(row)
        if shown:
            parts += [f"<h2>Bits by layer: {escape(row.name)}</h2>", shown]
    if any(row.coherence for row in rows):
        parts += ["<h2>What they write</h2>", *map(_texts, rows)]
    versions = settings.get("versions")
    if isinstance(versions, Mapping):
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts.append(f'<p class="note">Made by jquant evaluate: {escape(listed)}.</p>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"/>'
        f"<title>{escape(rows[0].name)}: evaluation</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _count(n: int) -> str:
    return "1 candidate" if n == 1 else f"{n} candidates"


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in line)}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(drawn: str, text: str) -> str:
    return f"<figure>{drawn}<figcaption>{escape(text)}</figcaption></figure>"


def _distribution(rows: Sequence[Row]) -> str:
    """Share of tokens whose divergence is at least x, for each file."""
    lines, levels = [], np.linspace(0, 1, _CURVE)
    for row in rows:
        assert row.tokens is not None
        assert row.tokens.kld is not None
        kld = row.tokens.kld.astype(np.float64)
        kld = np.maximum(kld[np.isfinite(kld)], 1e-9)
        # Evenly in log(share), for the rare large ones matter most.
        shares = np.unique(np.concatenate([levels, 10 ** (-levels * np.log10(max(kld.size, 2)))]))
        values = np.quantile(kld, 1 - shares)
        lines.append([(float(v), float(s)) for v, s in zip(values, shares, strict=True) if s > 0])
    x = svg.spanning("KL divergence of a token, nats", [v for line in lines for v, _ in line], log=True)
    rarest = min(s for line in lines for _, s in line)
    y = svg.Axis("share of tokens with at least that", rarest, 1.0, log=True)
    drawn = svg.curves([row.name for row in rows], lines, x, y, "distribution of KL divergence")
    return _figure(drawn, "A curve further left is a file closer to the original.")


def _sizes(rows: Sequence[Row]) -> str:
    found = [(row.nbytes / 1e6, row.scores.kld.value) for row in rows if row.scores and row.scores.kld]
    finite = [(row.name, pair) for row, pair in zip(rows, found, strict=True) if 0 < pair[1] < float("inf")]
    if not finite:
        return "<p>No candidate differs from the original by a finite amount.</p>"
    names, pairs = zip(*finite, strict=True)
    x = svg.spanning("size, MB", [a for a, _ in pairs])
    y = svg.spanning("mean KL divergence, nats", [b for _, b in pairs], log=True)
    drawn = svg.points(names, pairs, x, y, "size and mean KL divergence")
    return _figure(drawn, "Further left is smaller, further down is closer to the original.")


def _types(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        total = max(sum(spec.nbytes for spec in row.specs), 1)
        for kind, n, nbytes in by_type(row.specs):
            lines.append([row.name, kind, str(n), human_size(nbytes), f"{nbytes / total:.1%}"])
    return _table(("file", "type", "tensors", "size", "share"), lines)


def _bits(row: Row) -> str:
    """A cell for each matrix of each block; "" where the tensors are not a GGUF file's."""
    matrices: dict[str, dict[int, TensorSpec]] = {}
    for spec in row.specs:
        block = block_of(spec.name)
        if block is not None and len(spec.shape) > 1:
            matrices.setdefault(re.sub(r"blk\.\d+\.|\.weight$", "", spec.name), {})[block] = spec
    if not matrices:
        return ""
    columns = 1 + max(block for found in matrices.values() for block in found)
    tensors = sorted(matrices)
    values: list[list[float | None]] = [[None] * columns for _ in tensors]
    labels = [[""] * columns for _ in tensors]
    for r, name in enumerate(tensors):
        for block, spec in matrices[name].items():
            bits = values[r][block] = 8 * spec.nbytes / max(spec.size, 1)
            labels[r][block] = f"{spec.name}: {spec.type}, {bits:.2f} bits"
    drawn = svg.grid(tensors, columns, values, labels, f"bits by layer of {row.name}")
    known = [v for line in values for v in line if v is not None]
    span = (
        f"{min(known):.2f} to {max(known):.2f} bits a weight, a stronger colour is more; columns are blocks."
    )
    return _figure(drawn, span)


def _texts(row: Row) -> str:
    if row.coherence is None:
        return ""
    texts = [(s.prompt, _CONTROL.sub("\ufffd", s.text)) for s in row.coherence.samples if s.sampled]
    shown = "".join(f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>" for prompt, text in texts)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in row.coherence.parts.items())
    head = f"{row.name}: {row.coherence.verdict} ({parts})"
    return f"<details><summary>{escape(head)}</summary>{shown}</details>"
