"""Figures of what `analyze` found, drawn for print: pure functions from numbers to a matplotlib Figure.

An input is what matrices of a block are given: {(block, "attn_q, attn_k"): mean square of each channel}.
`new_figure` and `save` give every figure of jquant one look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Inputs = Mapping[tuple[int, str], np.ndarray]

WIDTH = 7.0  # inches: a page's text
# Distinct to the colour-blind. Source: Okabe and Ito 2008, Color universal design.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLOR_MAP = "viridis"  # grows evenly in lightness
ABSENT = "#E4E4E4"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "jquant",  # the same figure, the same bytes
}
_BINS = 192  # of channels: a pixel or more each in print
_BRIGHTEST = 1e3  # times the median: from here on, channels have the same colour
_TOP = 0.01  # share of the channels that `concentration` calls the top


def _style() -> AbstractContextManager[None]:
    return matplotlib.rc_context(STYLE)


def new_figure(
    rows: int, columns: int, *, height: float, width: float = WIDTH, sharex: bool = False
) -> tuple[Figure, np.ndarray]:
    """(figure, axes [rows, columns]) of this size in inches, without pyplot and its global state."""
    with _style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, squeeze=False, sharex=sharex)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write name.png, 200 dots an inch, and name.svg; each appears when it is complete."""
    paths = []
    for kind, metadata in (("png", {}), ("svg", {"Date": None})):
        path = folder / f"{name}.{kind}"
        partial = path.with_name(f"{path.name}.partial")
        try:
            with _style():
                figure.savefig(partial, format=kind, dpi=200, metadata=metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        paths.append(path)
    return paths


def importance(inputs: Inputs) -> Figure:
    """Mean square over all channels of an input, one row a projection, one column a block."""
    labels, blocks = _labels(inputs), _blocks(inputs)
    values = np.full((len(labels), len(blocks)), np.nan)
    for (block, label), channels in inputs.items():
        values[labels.index(label), blocks.index(block)] = channels.mean()
    figure, axes = new_figure(1, 1, height=0.9 + 0.34 * len(labels))
    with _style():
        _heat_map(figure, axes[0, 0], values, blocks, "mean x²")
        axes[0, 0].set(title="Importance by block and projection", xlabel="block")
        axes[0, 0].set_yticks(range(len(labels)), labels)
    return figure


def channels(inputs: Inputs) -> Figure:
    """How far channels stand out of their block: mean square by the block's median, one panel an input.

    Neighbouring channels share a bin, which shows the largest: an outlier is seen at any width.
    """
    labels, blocks = _labels(inputs), _blocks(inputs)
    figure, axes = new_figure(-(-len(labels) // 2), 2, height=0.4 + 2.3 * -(-len(labels) // 2))
    with _style():
        for ax in axes.flat[len(labels) :]:
            ax.set_axis_off()
        grids = [_channel_grid(inputs, label, blocks) for label in labels]
        largest = max(float(np.nanmax(grid)) for grid, _ in grids)
        top = max(2.0, min(largest, _BRIGHTEST))
        for ax, label, (grid, size) in zip(axes.flat, labels, grids, strict=False):
            width = max(len(c) for (_, name), c in inputs.items() if name == label)
            ax.imshow(
                grid,
                aspect="auto",
                origin="lower",
                interpolation="none",
                cmap=_color_map(),
                norm=LogNorm(1, top, clip=True),
                extent=(-0.5, len(blocks) - 0.5, -0.5, grid.shape[0] * size - 0.5),
            )
            ax.set(
                title=label, xlabel="block", ylabel="channel" if size == 1 else f"channel (bins of {size})"
            )
            ax.set_ylim(-0.5, width - 0.5)
            _block_ticks(ax, blocks)
        figure.colorbar(
            axes.flat[0].images[0],
            ax=axes,
            label="largest x² of the bin by the block's median",
            extend="max" if largest > top else "neither",
            aspect=40,
            pad=0.015,
        )
        figure.suptitle("Channels that stand out", fontsize=9)
    return figure


def concentration(inputs: Inputs) -> Figure:
    """How few channels hold the importance: share of the top 1%, and entropy by its greatest value."""
    labels = _labels(inputs)
    figure, axes = new_figure(2, 1, height=4.4, sharex=True)
    with _style():
        for i, label in enumerate(labels):
            found = sorted((block, c) for (block, name), c in inputs.items() if name == label)
            where = [block for block, _ in found]
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "label": label}
            axes[0, 0].plot(where, [top_share(c) for _, c in found], **style)
            axes[1, 0].plot(where, [relative_entropy(c) for _, c in found], **style)
        axes[0, 0].set(title="Importance held by the top 1% of channels", ylabel="share of the sum")
        axes[0, 0].set_ylim(bottom=0)
        axes[1, 0].set(title="Entropy of importance over channels", xlabel="block")
        axes[1, 0].set_ylabel("share of the greatest possible")
        axes[1, 0].set_ylim(top=1.02)
        for ax in axes.flat:
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(alpha=0.25, linewidth=0.5)
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(labels), 4)
        )
    return figure


def super_weights(
    weights: Sequence[tuple[int, int, int, float]], shapes: Mapping[int, tuple[int, int]]
) -> Figure:
    """Where super weights are, and what they are worth.

    weights: (block, row, column, change of the loss without it in nats a token). shapes: block → (rows,
    columns) of its down projection, of all blocks.
    """
    figure, axes = new_figure(2, 1, height=4.4, sharex=True)
    block, row, column, loss = (np.array(part) for part in zip(*weights, strict=True))
    with _style():
        for ax, place, axis, name in (
            (axes[0, 0], column, 1, "column of ffn_down\n(channel of its input)"),
            (axes[1, 0], row, 0, "row of ffn_down\n(channel of the residual stream)"),
        ):
            shown = ax.scatter(
                block, place, c=loss, s=45, cmap="cividis_r", edgecolors="black", linewidths=0.5, zorder=3
            )
            size = max(shape[axis] for shape in shapes.values())
            ax.set(ylabel=name, xlim=(-0.75, max(shapes) + 0.75), ylim=(-0.1 * size, 1.1 * size))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(alpha=0.25, linewidth=0.5)
            for i, (x, y) in enumerate(zip(block, place, strict=True)):
                # Above and below by turns: those of neighbouring blocks would meet.
                offset, side = ((0, 6), "bottom") if i % 2 == 0 else ((0, -6), "top")
                ax.annotate(
                    f"{y}", (x, y), offset, textcoords="offset points", ha="center", va=side, fontsize=7
                )
        axes[0, 0].set_title("Super weights")
        axes[1, 0].set_xlabel("block")
        figure.colorbar(
            shown, ax=axes, label="change of the loss without it, nats a token", aspect=40, pad=0.015
        )
    return figure


def top_share(channels: Float[np.ndarray, " n"]) -> float:
    """Share of the sum that the largest 1% of channels hold, of one at least."""
    count = max(1, round(_TOP * channels.size))
    total = float(channels.sum())
    return float(np.sort(channels)[-count:].sum()) / total if total > 0 else count / channels.size


def relative_entropy(channels: Float[np.ndarray, " n"]) -> float:
    """Entropy of the distribution of the sum over channels, by that of an even one."""
    total = float(channels.sum())
    if total <= 0 or channels.size < 2:
        return 1.0
    share = channels[channels > 0] / total
    return float(-(share * np.log(share)).sum() / np.log(channels.size))


def _labels(inputs: Inputs) -> list[str]:
    return list(dict.fromkeys(label for _, label in inputs))


def _blocks(inputs: Inputs) -> list[int]:
    return sorted({block for block, _ in inputs})


def _color_map() -> Colormap:
    return matplotlib.colormaps[COLOR_MAP].with_extremes(bad=ABSENT)


def _heat_map(figure: Figure, ax: Axes, values: np.ndarray, blocks: Sequence[int], label: str) -> None:
    """values: [rows, blocks], NaN where a block has no such input."""
    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    norm = LogNorm(low, high if high > low else 2 * low, clip=True)
    image = ax.imshow(values, aspect="auto", interpolation="none", cmap=_color_map(), norm=norm)
    ax.tick_params(left=False)
    ax.spines[:].set_visible(False)
    _block_ticks(ax, blocks)
    figure.colorbar(image, ax=ax, label=label, pad=0.015)


def _block_ticks(ax: Axes, blocks: Sequence[int]) -> None:
    step = next((s for s in (1, 2, 5, 10, 20, 50) if len(blocks) <= 12 * s), 100)
    ax.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])


def _channel_grid(inputs: Inputs, label: str, blocks: Sequence[int]) -> tuple[np.ndarray, int]:
    """([bins, blocks] of the largest ratio to the median, channels a bin)"""
    found = {block: c for (block, name), c in inputs.items() if name == label}
    width = max(len(c) for c in found.values())
    size = -(-width // _BINS)
    grid = np.full((-(-width // size), len(blocks)), np.nan)
    for block, values in found.items():
        usual = float(np.median(values)) or float(values.mean()) or 1.0
        padded = np.pad(values / usual, (0, grid.shape[0] * size - len(values)))
        grid[:, blocks.index(block)] = padded.reshape(-1, size).max(1)
    return grid, size
