"""Error feedback through a whole model, block by block: every layer is fitted to what reaches it.

Two streams of activations go through the blocks: x₀, those of the original model, and x, those of the model
as quantized so far. Within a block the matrices are quantized in the order in which data meets them, and each
sees, in x, the loss of all before it:

    H = Σ w x xᵀ,   C = Σ w x₀ xᵀ,   w = min(1, CAP · median |x|² / |x|²)

The weight w keeps a few tokens of enormous norm (attention sinks) from being all that H knows of. C moves
what a layer is fitted to, so that it also mends what was lost before it: see `transforms.feedback.corrected`.
Stacks of experts have no C, for the streams may take different experts; an expert's H leans on its stack's
mean, the more the fewer tokens it saw.

One block is in memory twice, as it was and as it is quantized, beside both streams' activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.between import IN_MEMORY, scratch
from jquant.calibrate import (
    Progress,
    Stats,
    add,
    add_rows,
    count_of,
    embed_into,
    padded,
    real_tokens,
    run_through,
    shared_inputs,
    weights_of,
    within_block,
)
from jquant.core import Block, BlockwiseModel, Format, QuantizedTensor, UserError, dequantize
from jquant.stages import stages
from jquant.transforms.feedback import DAMPING, Factor, corrected, factor, feedback_rows, tiles_of

CAP = 4.0
# Experts' statistics weigh their stack's mean as this many tokens a column.
MEAN_TOKENS = 0.25

Params = dict[str, dict[str, Array]]


@dataclass(frozen=True)
class Settings:
    strength: float = 1.0  # α of `corrected`; 0 fits every layer to itself
    correction_damping: float = 0.05  # λ of `corrected`
    damping: float = DAMPING  # of the factored Hessian


class Fed(NamedTuple):
    """A tensor that is done."""

    data: np.ndarray  # uint8 [rows, row bytes], a stack's matrices one below the other
    error: float  # tr ΔHΔᵀ / tr WHWᵀ of the bytes as written, Δ = W − Ŵ; NaN where an earlier run wrote them
    starved: tuple[int, ...] = ()  # experts that saw fewer tokens than they have columns


# The bytes [rows, row bytes] of a tensor that an interrupted run has finished.
Earlier = Callable[[str], np.ndarray | None]


def feed_back(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    formats: Mapping[str, Format],
    *,
    lengths: Int[np.ndarray, " s"] | None = None,
    settings: Settings = Settings(),
    earlier: Earlier = lambda name: None,
    batch: int = 4,
    threads: int = 2,
    folder: Path | None = None,
    progress: Progress = lambda done, count: None,
) -> Iterator[dict[str, Fed]]:
    """Block after block, its tensors in their formats.

    formats: by GGUF tensor name, of the matrices to quantize; all others stay as they are. lengths: real
    tokens of each sample; default: all. earlier: blocks whose tensors are all known are not computed again,
    and the run that continues gives the same bytes. folder: for activations that do not fit in memory.

    Raises UserError, with tensor, where a statistic is no finite number.
    """
    samples, length = tokens.shape
    real, batch = real_tokens(tokens, lengths), min(batch, samples)
    shape = (samples, length, model.embed(tokens[:0]).shape[-1])
    streams = [scratch(shape, folder, IN_MEMORY // 2) for _ in range(2)]
    for x in streams:
        embed_into(x, model, tokens)
    count = len(model.blocks)
    for i in range(count):
        block, original = model.blocks[i], model.load_block(i)
        angles = jnp.asarray(model.angles(i, length))
        shared = shared_inputs(model, i)
        names = [name for name in shared if name in formats]
        known = {name: data for name in names if (data := earlier(name)) is not None}
        run = Run(
            block, original, dict(original), angles, streams[0], streams[1], real, batch, settings, threads
        )
        if len(known) == len(names):
            done = {name: Fed(data, float("nan")) for name, data in known.items()}
            for name, fed in done.items():
                run.replace(within_block(name), fed.data, formats[name])
        else:
            done = run.quantize({within_block(name): formats[name] for name in names}, i, shared)
        if i < count - 1:
            run.advance()
        progress(i + 1, count)
        yield done


@dataclass
class Run:
    """One block on its way."""

    block: Block
    original: Params
    quantized: Params
    angles: Array
    x0: np.ndarray
    x: np.ndarray
    real: np.ndarray
    batch: int
    settings: Settings
    threads: int

    def quantize(self, formats: Mapping[str, Format], i: int, shared: Mapping[str, str]) -> dict[str, Fed]:
        first = {within_block(name): within_block(one) for name, one in shared.items()}
        found: dict[str, Fed] = {}
        for members in stages(formats):
            stats = self.gather(tuple(dict.fromkeys(first[name] for name in members)), i)
            for name in members:
                fed = self._fit(name, stats[first[name]], formats[name])
                found[f"blk.{i}.{name}.weight"] = fed
                self.replace(name, fed.data, formats[name])
        return found

    def replace(self, name: str, data: np.ndarray, format: Format) -> None:
        """From here on the block computes with the weights that these bytes are."""
        old = self.original[name]
        decoded = dequantize(QuantizedTensor({"blocks": jnp.asarray(data)}, format))
        self.quantized[name] = {**old, "weight": decoded.reshape(old["weight"].shape)}

    def advance(self) -> None:
        """Both streams through the block."""
        for params, x in ((self.original, self.x0), (self.quantized, self.x)):
            run_through(self.block, params, self.angles, x, x, self.batch)

    def gather(self, inputs: tuple[str, ...], i: int) -> dict[str, Stats]:
        stats: dict[str, Stats] = {}
        for name in inputs:
            *experts, _, width = self.original[name]["weight"].shape
            stats[name] = {"H": jnp.zeros((*experts, width, width)), "count": jnp.zeros(experts, jnp.int32)}
            if not experts:
                stats[name]["C"] = jnp.zeros((width, width))
        for start in range(0, len(self.x), self.batch):
            part = slice(start, min(start + self.batch, len(self.x)))
            x0, x, real = (padded(a[part], self.batch) for a in (self.x0, self.x, self.real))
            stats = _add_batch(self.block, self.original, self.quantized, stats, x0, x, self.angles, real)
        for name, s in stats.items():
            if not all(bool(jnp.isfinite(a).all()) for a in s.values()):
                raise UserError(
                    f"blk.{i}.{name}.weight: its inputs are not finite; the model is damaged, or float32 is "
                    "too small for it. `jquant analyze` on the same text says in which sample."
                )
        return stats

    def _fit(self, name: str, stats: Stats, format: Format) -> Fed:
        weight = self.original[name]["weight"]
        if weight.ndim == 2:
            data, loss, whole = self._fit_matrix(weight, stats["H"], stats["C"], format)
            return Fed(data, loss / (whole or 1.0))
        count = np.asarray(stats["count"])
        mean = jnp.sum(stats["H"], axis=0) / max(int(count.sum()), 1) * (MEAN_TOKENS * weight.shape[-1])
        parts = [self._fit_matrix(w, h + mean, None, format) for w, h in zip(weight, stats["H"], strict=True)]
        data, losses, wholes = zip(*parts, strict=True)
        starved = tuple(np.flatnonzero(count < weight.shape[-1]).tolist())
        return Fed(np.concatenate(data), sum(losses) / (sum(wholes) or 1.0), starved)

    def _fit_matrix(
        self, W: Array, H: Array, C: Array | None, format: Format
    ) -> tuple[np.ndarray, float, float]:
        """Its bytes, tr ΔHΔᵀ and tr WHWᵀ."""
        target, s = W, self.settings
        if C is not None and s.strength:
            target = corrected(W, H, C, s.strength, s.correction_damping)
        factors = factor(H, format.group_size, s.damping)
        data = self.rows(target, factors, format)
        decoded = dequantize(QuantizedTensor({"blocks": jnp.asarray(data)}, format))
        return data, float(_quadratic(W - decoded, H)), float(_quadratic(W, H))

    def rows(self, W: Array, factors: Factor, format: Format) -> np.ndarray:
        """Tiles of rows, as many at once as there are threads."""

        def encode(tile: Array) -> np.ndarray:
            return np.asarray(feedback_rows(tile, factors, format))

        with ThreadPoolExecutor(self.threads) as pool:
            return np.concatenate(list(pool.map(encode, tiles_of(W))))[: len(W)]


@jax.jit
def _quadratic(a: Array, H: Array) -> Array:
    """tr a H aᵀ."""
    return jnp.sum(jnp.matmul(a, H, precision=lax.Precision.HIGHEST) * a)


@partial(jax.jit, static_argnums=0)
def _add_batch(
    block: Block,
    original: Params,
    quantized: Params,
    stats: dict[str, Stats],
    x0: Float[Array, "s t width"],
    x: Float[Array, "s t width"],
    angles: Float[Array, "t pairs"],
    real: Int[Array, " s"],
) -> dict[str, Stats]:
    """The statistics with these samples added. What lies behind these inputs is not computed."""
    shown0 = block.apply({"params": original}, x0, angles, mutable="inputs")[1]["inputs"]
    shown = block.apply({"params": quantized}, x, angles, mutable="inputs")[1]["inputs"]
    counted = weights_of(x, real)
    out = {}
    for name, before in stats.items():
        inputs = shown[name]
        rows = (inputs["x"], shown0[name]["x"]) if "C" in before else (inputs["x"],)
        out[name] = add_rows(_add_products, before, inputs, rows, counted)
    return out


def _add_products(stats: Stats, x: Float[Array, "n width"], *more: Array) -> Stats:
    """more: x₀ [n, width] where the statistics have C, then the weight [n], 0 for what is no token."""
    *original, counted = more
    xw = x * _capped(x, counted)[:, None]
    products = {
        name: jnp.matmul(a.T, xw, precision=lax.Precision.HIGHEST)
        for name, a in zip("HC", (x, *original), strict=False)
    }
    return add(stats, {**products, "count": count_of(counted)})


def _capped(x: Float[Array, "n width"], counted: Float[Array, " n"]) -> Float[Array, " n"]:
    """The weight of each token."""
    size = jnp.sum(x * x, axis=1)
    median = jnp.nanmedian(jnp.where(counted > 0, size, jnp.nan))
    bounded = jnp.minimum(1.0, CAP * median / jnp.where(size > 0, size, 1.0))
    return jnp.where(counted > 0, bounded, 0.0)
