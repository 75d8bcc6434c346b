"""Factors that smooth a whole model: of one alpha, from the extremes of inputs on samples of text.

stats = measure(model, samples)
smoothing = fixed(model, stats, 0.5)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jquant.calibration import Progress, Stats, collect
from jquant.calibration.ranges import EXTREMES
from jquant.checkpoints import rescaled
from jquant.checkpoints.model import Model
from jquant.core import UserError
from jquant.models import Block, Decoder, Parameters
from jquant.smoothquant import _smooth as smooth
from jquant.smoothquant._smooth import Coupling
from jquant.text.samples import Samples

OUTSTANDING = 4.0  # times what a place costs on average


class Place(NamedTuple):
    """What smoothing did to one input of a block."""

    block: int
    name: str  # of the coupling
    consumers: tuple[str, ...]
    scales: np.ndarray  # s: float32 [*stack, channels]; negative where the channel changes its sign
    alpha: float | None  # None: searched channel by channel, or left as it was
    before: float  # largest channel's maximum by the median channel's
    after: float

    @property
    def matrices(self) -> tuple[str, ...]:
        """GGUF names of those that are given this input and may be quantized."""
        return tuple(f"blk.{self.block}.{name}.weight" for name in smooth.without_routers(self.consumers))


class Smoothing(NamedTuple):
    places: tuple[Place, ...]
    # Where searched: mean KL divergence, in nats, expected of each block's error with weights and inputs
    # rounded, as it was and smoothed.
    errors: tuple[tuple[float, float], ...] = ()
    # In blocks that stand out what is left of it if a place's consumers stay as they are, by block and place.
    kept: Mapping[int, Mapping[str, float]] = {}

    def scales(self, block: int) -> dict[str, np.ndarray]:
        return {place.name: place.scales for place in self.places if place.block == block}

    @property
    def limit(self) -> float:
        """The error above which a place, or a block, stands out."""
        return OUTSTANDING * sum(after for _, after in self.errors) / max(len(self.places), 1)

    @property
    def outstanding(self) -> tuple[int, ...]:
        """Blocks that stand out. Only they can have a place that does."""
        return tuple(i for i, (_, after) in enumerate(self.errors) if after > self.limit)

    def saved(self, place: Place) -> float:
        """The error that is gone if the place's consumers stay as they are; 0 where `kept` does not say."""
        left = self.kept.get(place.block, {}).get(place.name)
        return 0.0 if left is None else self.errors[place.block][1] - left

    def stands_out(self, place: Place) -> bool:
        return self.saved(place) > self.limit

    def without_outstanding(self) -> Smoothing:
        """Where all that stands out stays as it is: errors without what each place's consumers cause."""
        errors = list(self.errors)
        for place in filter(self.stands_out, self.places):
            before, after = errors[place.block]
            errors[place.block] = before, max(after - self.saved(place), 0.0)
        return self._replace(errors=tuple(errors), kept={})


@dataclass(frozen=True)
class Smoothed:
    """A BlockwiseModel: the decoder's function with smoothed weights. factors: see `factors`."""

    decoder: Decoder
    factors: Mapping[str, rescaled.Factors]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.decoder.blocks

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.decoder.embed(tokens)

    def load_block(self, i: int) -> Parameters:
        start = f"blk.{i}."
        own = {name.removeprefix(start): f for name, f in self.factors.items() if name.startswith(start)}
        return smooth.with_factors(self.decoder.load_block(i), own)

    def angles(self, i: int, tokens: int) -> np.ndarray:
        return self.decoder.angles(i, tokens)

    def logits(self, x: Array) -> Array:
        return self.decoder.logits(x)


def measure(
    model: Model,
    samples: Samples,
    *,
    batch: int = 4,
    progress: Progress = lambda done, count: None,
) -> dict[str, Stats]:
    """Absolute maxima and second moments of the inputs of every matrix, by GGUF name."""
    return collect(
        model.decoder(),
        samples.tokens,
        EXTREMES,
        lengths=samples.lengths,
        batch=batch,
        progress=progress,
    )


def maxima(coupling: Coupling, block: int, stats: Mapping[str, Stats]) -> Array:
    """max|x| of each channel: float32 [*stack, channels]. The router, where there is one, sees all tokens.

    Raises UserError where the inputs were not measured.
    """
    routers = [name for name in coupling.consumers if name.endswith("gate_inp")]
    name = f"blk.{block}.{(routers or coupling.consumers)[0]}.weight"
    if name not in stats:
        raise UserError(f"{name}: nothing is known of its inputs; measure them on this model.")
    # Statistics are held to the host's memory; what is made of them is computed where the weights are.
    return smooth.of_channels(coupling, jnp.asarray(np.asarray(stats[name]["absmax"])))


def fixed(decoder: Decoder, stats: Mapping[str, Stats], alpha: float) -> Smoothing:
    """The plain method: one alpha for all. Raises UserError where it is not between 0 and 1."""
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha:g}: must be between 0 and 1; 0.5 suits most models.")
    places: list[Place] = []
    for i, block in enumerate(decoder.blocks):
        params = decoder.load_block(i)
        found = smooth.couplings(block)
        logs = {}
        for coupling in found:
            weights = smooth.weight_maxima(coupling, params)
            logs[coupling.name] = smooth.smooth(maxima(coupling, i, stats), weights, alpha)
        places += described(i, found, stats, logs, dict.fromkeys(logs, alpha))
    return Smoothing(tuple(places))


def described(
    block: int,
    found: Sequence[Coupling],
    stats: Mapping[str, Stats],
    logs: Mapping[str, Array],
    alphas: Mapping[str, float | None],
) -> list[Place]:
    """What is to be said of these factors, exp(logs)."""
    places = []
    for coupling in found:
        x, s = np.asarray(maxima(coupling, block, stats)), np.exp(np.asarray(logs[coupling.name]))
        places.append(
            Place(
                block,
                coupling.name,
                coupling.consumers,
                s.astype(np.float32),
                alphas[coupling.name],
                outlier_ratio(x),
                outlier_ratio(x / s),
            )
        )
    return places


def outlier_ratio(maxima: np.ndarray) -> float:
    """The largest channel's maximum by the median of those that are not 0; of a stack the worst expert's."""
    ratios = [1.0]
    for row in np.atleast_2d(maxima):
        seen = row[row > 0]
        if seen.size:
            ratios.append(float(seen.max() / np.median(seen)))
    return max(ratios)


def importance(
    decoder: Decoder, stats: Mapping[str, Stats], smoothing: Smoothing | None
) -> dict[str, np.ndarray]:
    """Mean squares of the inputs of each matrix as it will be: float32 [matrices, cols], by GGUF name."""
    found: dict[str, np.ndarray] = {}
    for name, s in stats.items():
        sums = np.atleast_2d(np.asarray(s["sum2"], np.float64))
        count = np.maximum(np.asarray(s["count"], np.float64).reshape(-1, 1), 1)
        # An expert that no token reached takes its stack's mean.
        mean = np.where(sums.any(-1, keepdims=True), sums / count, (sums / count).mean(0))
        found[name] = mean
    if smoothing is not None:
        for i, block in enumerate(decoder.blocks):
            scales = {name: jnp.asarray(s) for name, s in smoothing.scales(i).items()}
            for tensor, factors in smooth.factors_of(block, scales).items():
                name = f"blk.{i}.{tensor}.weight"
                if factors.cols is not None and name in found:
                    found[name] = found[name] / np.square(np.asarray(factors.cols, np.float64))
    return {name: value.astype(np.float32) for name, value in found.items() if (value > 0).any()}


def factors(decoder: Decoder, smoothing: Smoothing) -> dict[str, rescaled.Factors]:
    """What each tensor of the model is multiplied by, NumPy, by GGUF name without ".weight"."""
    found = {}
    for i, block in enumerate(decoder.blocks):
        scales = {name: jnp.asarray(s) for name, s in smoothing.scales(i).items()}
        made = jax.device_get(smooth.factors_of(block, scales))
        found |= {f"blk.{i}.{tensor}": value for tensor, value in made.items()}
    return found
