"""What smoothing did, place by place, and what to do about the blocks that stay bad."""

from __future__ import annotations

from statistics import median

from jquant.smoothing import Place, Smoothing
from jquant.text import text_table

# An error so many times the median block's stands out.
OUTSTANDING = 4.0
OUTLIERS = 20.0  # largest channel by the median one, from which 8 bits leave most channels few levels


def advice(smoothing: Smoothing, place: Place) -> str:
    """What would help; "" where nothing needs to."""
    if smoothing.errors:
        errors = [after for _, after in smoothing.errors]
        if errors[place.block] <= OUTSTANDING * median(errors):
            return ""
        if place.after > OUTLIERS:
            return f"keep in 16 bit: --keep 'layers\\.{place.block}\\.'"
        return ""
    if place.after > OUTLIERS and place.alpha is not None and place.alpha < 0.9:
        return "higher alpha"
    return ""


def smoothing_report(smoothing: Smoothing) -> list[dict[str, object]]:
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
            "advice": advice(smoothing, place) or None,
        }
        if smoothing.errors:
            before, after = smoothing.errors[place.block]
            row |= {"block_error": before, "smoothed_block_error": after}
        rows.append(row)
    return rows


def smoothing_table(smoothing: Smoothing) -> str:
    rows = []
    for place in smoothing.places:
        error = ""
        if smoothing.errors:
            before, after = smoothing.errors[place.block]
            error = f"{before:.2e} → {after:.2e}"
        alpha = "searched" if place.alpha is None else f"{place.alpha:.2f}"
        outliers = f"{place.before:.1f} → {place.after:.1f}"
        rows.append((str(place.block), place.name, outliers, alpha, error, advice(smoothing, place)))
    header = ("block", "behind", "outlier ratio", "alpha", "block error", "advice")
    return text_table(header, rows, (0, 2, 3, 4))
