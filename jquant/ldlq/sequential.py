"""Error feedback through a whole model, block by block: every layer is fitted to what reaches it.

Within a block the matrices are quantized in the order in which data meets them, and each sees, in the second
of two `streams`, the loss of all before it. The streams' C moves what a layer is fitted to, so that it also
mends what was lost before it (`transforms.correction`); batches go in turn to the two halves that judge each
other. An expert's H leans on its stack's mean, the more the fewer tokens it saw.

The output matrix comes last, a slab of rows at a time. Where its rows are the embeddings of tokens too, it is
not fitted to what was lost, and columns that the output hardly uses keep their share of bits: damping is the
Hessian of an embedding, which needs all columns alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int

from jquant.calibration import Progress, embed_into, real_tokens, shape_of, shared_inputs, within_block
from jquant.calibration.activations import IN_MEMORY, scratch
from jquant.core import BlockwiseModel, Format, Head, QuantizedTensor, dequantize
from jquant.distributed.team import ALONE, Team
from jquant.ldlq.correction import Moments, Strength, corrected, cross_validated
from jquant.ldlq.ldlq import DAMPING, Factor, factor, feedback_rows, tiles_of
from jquant.ldlq.streams import Gathered, Streams, gather_head, open_streams
from jquant.models import stages

# Of the α that mends most on the tokens held out, which are of the samples' own kind and see one layer only:
# 0.6 keeps 84% of what there is to mend, and the model does better for it, on other text most.
TRUST = 0.6
# Damping of the output matrix's Hessian. smol768 in Q6_K, 4 chunks: KL divergence from the output matrix and
# from both its uses 0.0044 and 0.0051 by nearest codes, 0.0016 and 0.0024 with importance, and fed back
# 0.00075 and 0.0011 (damping 0.01), 0.0007 and 0.0010 (0.1), 0.0009 and 0.0014 (1).
HEAD_DAMPING = 0.1
# Experts' statistics weigh their stack's mean as this many tokens a column.
MEAN_TOKENS = 0.25


@dataclass(frozen=True)
class Settings:
    correction: Strength | None = None  # default: by cross-validation; α = 0 fits every layer to itself
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
    head: Head | None = None,
    lengths: Int[np.ndarray, " s"] | None = None,
    settings: Settings = Settings(),
    earlier: Earlier = lambda name: None,
    batch: int = 4,
    threads: int = 2,
    folder: Path | None = None,
    team: Team = ALONE,
    progress: Progress = lambda done, count: None,
) -> Iterator[dict[str, Fed]]:
    """Block after block, its tensors in their formats, then the output matrix.

    formats: by GGUF tensor name, of the matrices to quantize; all others stay as they are. head: of the
    model, where the output matrix may be among them. lengths: real tokens of each sample; default: all.
    earlier: blocks whose tensors are all known are not computed again, and the run that continues gives the
    same bytes. folder: for activations that do not fit in memory. team: processes of which each has samples
    of its own and codes a part of the rows; all get the same tensors.

    Raises UserError, with tensor, where a statistic is no finite number.
    """
    real, batch = real_tokens(tokens, lengths), min(batch, len(tokens))
    x0, x = (scratch(shape_of(model, tokens), folder, IN_MEMORY // 2) for _ in range(2))
    for stream in (x0, x):
        embed_into(stream, model, tokens)
    fitter = Fitter(settings, threads, team)
    count, output = len(model.blocks), None if head is None else formats.get(head.output_name)
    for i in range(count):
        streams = open_streams(model, i, x0, x, real, batch, team=team)
        names = [name for name in shared_inputs(model, i) if name in formats]
        own = {within_block(name): formats[name] for name in names}
        known = {name: data for name in names if (data := earlier(name)) is not None}
        if len(known) == len(names):
            done = {name: Fed(data, float("nan")) for name, data in known.items()}
            streams.follow(own, {within_block(name): data for name, data in known.items()})
        else:
            done = {f"blk.{i}.{name}.weight": fed for name, fed in fitter.quantize(streams, own).items()}
        if i < count - 1 or output is not None:
            streams.advance()
        progress(i + 1, count)
        yield done
    if head is not None and output is not None:
        data = earlier(head.output_name)
        if data is None:
            fed = fitter.output(head, output, *gather_head(head, x0, x, real, batch, team))
        else:
            fed = Fed(data, float("nan"))
        yield {head.output_name: fed}


@dataclass(frozen=True)
class Fitter:
    """Codes the matrices of a block."""

    settings: Settings = Settings()
    threads: int = 2
    team: Team = ALONE

    def quantize(self, streams: Streams, formats: Mapping[str, Format]) -> dict[str, Fed]:
        """By name within the block."""
        found: dict[str, Fed] = {}
        for members in stages(formats):
            stats = streams.gather(members)
            for name in members:
                weight, inputs = streams.original[name]["weight"], streams.first[name]
                found[name] = self._fit(weight, stats, inputs, formats[name])
                streams.replace(name, found[name].data, formats[name])
        return found

    def output(self, head: Head, format: Format, moments: Moments, halves: tuple[Moments, Moments]) -> Fed:
        """A slab of rows after the other."""
        slabs = head.output_slabs()
        factors = factor(moments.H, format.group_size, HEAD_DAMPING)
        chosen = Strength(0.0, 1.0)
        if not head.tied:
            chosen = self._strength(jnp.asarray(head.output_rows(*slabs[0])), halves)
        data, losses, wholes = [], [], []
        for start, stop in slabs:
            W = jnp.asarray(head.output_rows(start, stop))
            made = self._coded(W, _target(W, moments, chosen), moments.H, factors, format)
            data.append(made[0])
            losses.append(made[1])
            wholes.append(made[2])
        return Fed(np.concatenate(data), sum(losses) / (sum(wholes) or 1.0))

    def _fit(self, weight: Array, stats: Gathered, inputs: str, format: Format) -> Fed:
        if weight.ndim == 2:
            moments, halves = stats.of(inputs)
            target = _target(weight, moments, self._strength(weight, halves))
            data, loss, whole = self._fit_matrix(weight, target, moments.H, format)
            return Fed(data, loss / (whole or 1.0))
        H, count = stats.stacks[inputs]["H"], np.asarray(stats.stacks[inputs]["count"])
        mean = jnp.sum(H, axis=0) / max(int(count.sum()), 1) * (MEAN_TOKENS * weight.shape[-1])
        parts = [self._fit_matrix(w, w, h + mean, format) for w, h in zip(weight, H, strict=True)]
        data, losses, wholes = zip(*parts, strict=True)
        starved = tuple(np.flatnonzero(count < weight.shape[-1]).tolist())
        return Fed(np.concatenate(data), sum(losses) / (sum(wholes) or 1.0), starved)

    def _strength(self, W: Array, halves: tuple[Moments, Moments]) -> Strength:
        """Of the correction of what rows like these are fitted to."""
        if self.settings.correction is not None:
            return self.settings.correction
        found = cross_validated(W, halves)
        return found._replace(alpha=TRUST * found.alpha)

    def _fit_matrix(
        self, W: Array, target: Array, H: Array, format: Format
    ) -> tuple[np.ndarray, float, float]:
        """Its bytes, tr ΔHΔᵀ and tr WHWᵀ."""
        return self._coded(W, target, H, factor(H, format.group_size, self.settings.damping), format)

    def _coded(
        self, W: Array, target: Array, H: Array, factors: Factor, format: Format
    ) -> tuple[np.ndarray, float, float]:
        data = self.rows(target, factors, format)
        decoded = dequantize(QuantizedTensor({"blocks": jnp.asarray(data)}, format))
        return data, float(_quadratic(W - decoded, H)), float(_quadratic(W, H))

    def rows(self, W: Array, factors: Factor, format: Format) -> np.ndarray:
        """Tiles of rows, as many at once as there are threads."""

        def encode(tile: Array) -> np.ndarray:
            return np.asarray(feedback_rows(tile, factors, format))

        tiles = tiles_of(W)
        with ThreadPoolExecutor(self.threads) as pool:
            made = list(pool.map(encode, tiles[self.team.part]))
        row_bytes = W.shape[1] // format.block_size * format.block_bytes
        return np.concatenate(self.team.gathered(made, len(tiles), (tiles.shape[1], row_bytes)))[: len(W)]


def _target(W: Array, moments: Moments, strength: Strength) -> Array:
    """What is coded."""
    return W if strength.alpha == 0 else corrected(W, moments, *strength)


@jax.jit
def _quadratic(a: Array, H: Array) -> Array:
    """tr a H aᵀ."""
    return jnp.sum(jnp.matmul(a, H, precision=lax.Precision.HIGHEST) * a)
