"""What smoothing did, place by place, and what to do about those that stand out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from jquant.core.human import text_table
from jquant.smoothquant.smoothing import Place, Smoothing

OUTLIERS = 20.0  # largest channel by the median one, from which 8 bits leave most channels few levels

Stored = Mapping[str, Sequence[str]]  # names in the folder, by GGUF name


def advice(smoothing: Smoothing, place: Place, stored: Stored) -> str:
    """What would help; "" where nothing needs to."""
    if smoothing.stands_out(place):
        left = smoothing.kept[place.block][place.name]
        return f"keep in 16 bit: keep='{_pattern(place, stored)}', leaves {left:.2e}"
    if not smoothing.errors and place.after > OUTLIERS and place.alpha is not None and place.alpha < 0.9:
        return "higher alpha"
    return ""


def _pattern(place: Place, stored: Stored) -> str:
    """A pattern of the names that a place's consumers have in the folder; of experts all."""
    start = _start(place, stored)
    found: dict[str, dict[str, None]] = {}  # of each module its matrices, in order
    for name in _names(place, stored):
        *module, last = re.split(start, name, maxsplit=1)[1].removesuffix(".weight").split(".")
        head = "".join(r"\d+\." if part.isdecimal() else re.escape(f"{part}.") for part in module)
        found.setdefault(head, {})[re.escape(last)] = None
    return start + _any(head + _any(own) for head, own in found.items())


def _any(patterns: Iterable[str]) -> str:
    found = list(patterns)
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"


def _start(place: Place, stored: Stored) -> str:
    """What the names of a block have in common, such as layers\\.0\\."""
    parts = _names(place, stored)[0].split(".")
    i = parts.index(str(place.block))
    return re.escape(".".join(parts[max(i - 1, 0) : i + 1]) + ".")


def _names(place: Place, stored: Stored) -> list[str]:
    return [part for name in place.matrices for part in stored[name]]


def smoothing_report(smoothing: Smoothing, stored: Stored) -> list[dict[str, object]]:
    """One JSON value a place."""
    rows: list[dict[str, object]] = []
    for place in smoothing.places:
        row: dict[str, object] = {
            "block": place.block,
            "place": place.name,
            "inputs_of": list(place.consumers),
            "alpha": place.alpha,
            "outlier_ratio": round(place.before, 3),
            "smoothed_outlier_ratio": round(place.after, 3),
            "advice": advice(smoothing, place, stored) or None,
        }
        if smoothing.errors:
            before, after = smoothing.errors[place.block]
            row |= {"block_error": before, "smoothed_block_error": after}
        if place.block in smoothing.kept:
            row["block_error_if_kept"] = smoothing.kept[place.block][place.name]
        rows.append(row)
    return rows


def smoothing_table(smoothing: Smoothing, stored: Stored) -> str:
    rows = []
    for place in smoothing.places:
        error = ""
        if smoothing.errors:
            before, after = smoothing.errors[place.block]
            error = f"{before:.2e} → {after:.2e}"
        alpha = "searched" if place.alpha is None else f"{place.alpha:.2f}"
        outliers = f"{place.before:.1f} → {place.after:.1f}"
        said = advice(smoothing, place, stored)
        rows.append((str(place.block), place.name, outliers, alpha, error, said))
    header = ("block", "behind", "outlier ratio", "alpha", "block error", "advice")
    return text_table(header, rows, (0, 2, 3, 4))
