"""The two streams of activations that error feedback leads through a block, and what it learns from them.

Two streams of activations go through the blocks: x₀, those of the original model, and x, those of the model
as quantized so far. The statistics of a matrix's inputs are

    H = Σ w x xᵀ,   C = Σ w x₀ xᵀ,   w = min(1, CAP · median |x|² / |x|²)

The weight w keeps a few tokens of enormous norm (attention sinks) from being all that H knows of. Stacks of
experts have no C, for the streams may take different experts.

One block is in memory twice, as it was and as it is quantized, beside both streams' activations. Where they
fit too, the inputs of its matrices are kept while the block lasts, so that no stage computes again what the
stages before it have computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jquant.calibration import (
    Stats,
    add,
    add_rows,
    batches,
    count_of,
    padded,
    shared_inputs,
    turn,
    weights_of,
    within_block,
)
from jquant.calibration.activations import IN_MEMORY
from jquant.core import Block, BlockwiseModel, Format, Head, QuantizedTensor, UserError, dequantize
from jquant.distributed.team import ALONE, Team
from jquant.ldlq.correction import Moments
from jquant.models import inputs_of, run_block, stage, stages

CAP = 4.0

Params = dict[str, dict[str, Array]]
Inputs = dict[str, np.ndarray]  # [s, t, width] by matrix
Shown = Mapping[str, Mapping[str, Array]]


def open_streams(
    model: BlockwiseModel,
    i: int,
    x0: np.ndarray,
    x: np.ndarray,
    real: np.ndarray,
    batch: int,
    samples: int | None = None,
    team: Team = ALONE,
) -> Streams:
    """Before block i. samples: of the whole run, where these activations are part of it."""
    _, block, original, angles = turn(model, i, x.shape[1])
    first = {within_block(name): within_block(one) for name, one in shared_inputs(model, i).items()}
    widths = [original[name]["weight"].shape[-1] for name in _worth_keeping(first, original)]
    size = 2 * 4 * (samples or len(x)) * x.shape[1] * sum(widths)
    return Streams(
        i,
        block,
        original,
        dict(original),
        first,
        angles,
        x0,
        x,
        real,
        batch,
        keeps=jax.default_backend() == "cpu" and size <= IN_MEMORY // 2,
        team=team,
    )


def _worth_keeping(first: Mapping[str, str], params: Params) -> list[str]:
    """Inputs of matrices that take more than a norm to compute; not those of experts, which go their ways."""
    return [name for name in dict.fromkeys(first.values()) if stage(name) and _is_dense(params, name)]


def _is_dense(params: Params, name: str) -> bool:
    return params[name]["weight"].ndim == 2


class Gathered(NamedTuple):
    """Statistics by matrix: of stacks those of all batches, of others in two halves, batches in turn."""

    even: dict[str, Stats]
    odd: dict[str, Stats]
    stacks: dict[str, Stats]

    def of(self, name: str) -> tuple[Moments, tuple[Moments, Moments]]:
        """Those of all tokens, and of the two halves."""
        even, odd = self.even[name], self.odd[name]
        whole = Moments(even["H"] + odd["H"], even["C"] + odd["C"])
        one, other = (Moments(half["H"], half["C"]) for half in (even, odd))
        return whole, (one, other)

    def check_finite(self, where: str) -> None:
        """Raise UserError unless all are. where: what comes before these names in the model's."""
        for name, s in (*self.even.items(), *self.odd.items(), *self.stacks.items()):
            if not all(bool(jnp.isfinite(a).all()) for a in s.values()):
                raise UserError(
                    f"{where}{name}.weight: its inputs are not finite; the model is damaged, or "
                    "float32 is too small for it. `jquant analyze` on the same text says in which sample."
                )


@dataclass
class Streams:
    """One block and what is on its way through it. Matrices have their names within it."""

    i: int
    block: Block
    original: Params
    quantized: Params
    first: Mapping[str, str]  # of the matrices with one input, the one that stands for it
    angles: Array
    x0: np.ndarray
    x: np.ndarray
    real: np.ndarray
    batch: int
    keeps: bool  # inputs: elsewhere than on a CPU the way to the host costs more than to compute them again
    kept: tuple[Inputs, Inputs] = field(default_factory=lambda: ({}, {}))  # of x0 and of x
    team: Team = ALONE

    def follow(self, formats: Mapping[str, Format], known: Mapping[str, np.ndarray]) -> None:
        """The way that a run went when it made these bytes: the same sums in the same order."""
        for members in stages(formats):
            if self.keeps:
                for part in self._parts():
                    self._shown(part, self._inputs_of(members))
            for name in members:
                self.replace(name, known[name], formats[name])

    def replace(self, name: str, data: np.ndarray, format: Format) -> None:
        """From here on the block computes with the weights that these bytes are."""
        old = self.original[name]
        decoded = dequantize(QuantizedTensor({"blocks": jnp.asarray(data)}, format))
        self.quantized[name] = {**old, "weight": decoded.reshape(old["weight"].shape)}

    def advance(self) -> None:
        """Both streams through the block."""
        for part in self._parts():
            for stream, (params, x) in enumerate(self._streams):
                given = self._given(stream, part)
                y = run_block(self.block, params, padded(x[part], self.batch), self.angles, given)
                x[part] = y[: part.stop - part.start]

    def gather(self, members: Iterable[str]) -> Gathered:
        """The statistics of these matrices' inputs."""
        inputs = self._inputs_of(members)
        dense = tuple(name for name in inputs if _is_dense(self.original, name))
        halves = [self._nothing(dense), self._nothing(dense)]
        stacks = self._nothing(tuple(name for name in inputs if name not in dense))
        for number, part in enumerate(self._parts(), start=self.team.me):
            counted = weights_of(*(padded(a[part], self.batch) for a in (self.x, self.real)))
            shown = self._shown(part, inputs)
            halves[number % 2] = _add_batch(halves[number % 2], *shown, counted)
            stacks = _add_batch(stacks, *shown, counted)
        gathered = Gathered(*self.team.sum((halves[0], halves[1], stacks)))
        gathered.check_finite(f"blk.{self.i}.")
        return gathered

    def _nothing(self, inputs: tuple[str, ...]) -> dict[str, Stats]:
        """Statistics of no tokens."""
        shapes = {name: self.original[name]["weight"].shape for name in inputs}
        return {name: _none(shape[-1], shape[:-2]) for name, shape in shapes.items()}

    @property
    def _streams(self) -> tuple[tuple[Params, np.ndarray], tuple[Params, np.ndarray]]:
        return (self.original, self.x0), (self.quantized, self.x)

    def _parts(self) -> Iterator[slice]:
        return batches(len(self.x), self.batch)

    def _inputs_of(self, members: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.first[name] for name in members))

    def _shown(self, part: slice, names: tuple[str, ...]) -> tuple[Shown, Shown]:
        """What these matrices are given of a batch in the original model, experts aside, and as quantized."""
        dense = tuple(name for name in names if _is_dense(self.original, name))
        return self._shown_in(0, part, dense), self._shown_in(1, part, names)

    def _shown_in(self, stream: int, part: slice, names: tuple[str, ...]) -> Shown:
        """Kept where that saves work later."""
        params, x = self._streams[stream]
        given = self._given(stream, part, but=names)
        shown = inputs_of(self.block, params, padded(x[part], self.batch), self.angles, names, given)
        for name in _worth_keeping(self.first, self.original) if self.keeps else ():
            if name in shown and shown[name]["x"].ndim == 3:  # a router's are [tokens, width]
                value, kept = shown[name]["x"], self.kept[stream]
                if name not in kept:
                    kept[name] = np.empty((len(self.x), *value.shape[1:]), value.dtype)
                kept[name][part] = value[: part.stop - part.start]
        return shown

    def _given(self, stream: int, part: slice, but: tuple[str, ...] = ()) -> Shown:
        """What is known of the inputs of a batch, by every matrix that has them."""
        values_of = {name: values for name, values in self.kept[stream].items() if name not in but}
        kept = {name: padded(values[part], self.batch) for name, values in values_of.items()}
        return {name: {"x": kept[one]} for name, one in self.first.items() if one in kept}


def gather_head(
    head: Head, x0: np.ndarray, x: np.ndarray, real: np.ndarray, batch: int, team: Team = ALONE
) -> tuple[Moments, tuple[Moments, Moments]]:
    """The statistics of the output matrix's inputs, all and in halves. x0, x: what the last block gives."""
    name = head.output_name.removesuffix(".weight")
    halves = [{name: _none(x.shape[-1])} for _ in range(2)]
    for number, part in enumerate(batches(len(x), batch), start=team.me):
        given0, given, count = (padded(a[part], batch) for a in (x0, x, real))
        shown0, shown = ({name: {"x": head.output_inputs(a)}} for a in (given0, given))
        halves[number % 2] = _add_batch(halves[number % 2], shown0, shown, weights_of(given, count))
    gathered = Gathered(*team.sum((halves[0], halves[1], {})))
    gathered.check_finite("")
    return gathered.of(name)


def _none(width: int, experts: tuple[int, ...] = ()) -> Stats:
    """Statistics of no tokens."""
    stats = {"H": jnp.zeros((*experts, width, width)), "count": jnp.zeros(experts, jnp.int32)}
    return stats if experts else {**stats, "C": jnp.zeros((width, width))}


@jax.jit
def _add_batch(
    stats: dict[str, Stats],
    shown0: Shown,
    shown: Shown,
    counted: Float[Array, " n"],
) -> dict[str, Stats]:
    """The statistics with a batch's inputs added. shown0: those of the original model."""
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
