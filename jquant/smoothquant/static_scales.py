"""One scale for all inputs of a matrix, rather than one for each token: what W8A8 calls static.

    s = c max|x| / Q,   Q: `activations.LARGEST`

The maximum is that of all samples. c of CLIPS is chosen place by place, in the order of the data, for the
least error of the block's output once all its inputs are rounded, each token's counting what it costs the
model's predictions. Matrices that are given the same input have the same scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jquant.calibration import Progress, Stats, shared_inputs, token_fisher, walk, within_block
from jquant.core import UserError
from jquant.int8.rounding import LARGEST, STATIC_ROUNDINGS
from jquant.models import Block, Decoder, Parameters, stage
from jquant.smoothquant import _smooth as smooth
from jquant.smoothquant._passes import cut, embedded
from jquant.smoothquant._search import DEFAULT, Search
from jquant.smoothquant.smoothing import Smoothing
from jquant.text.samples import Samples

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@partial(jax.jit, static_argnums=0)
def _error(block: Block, params: Parameters, x: Array, y: Array, fisher: Array, angles: Array) -> Array:
    """Σ f |ŷ − y|². fisher: f, [s, t], see `token_fisher`.

    By |y|² alone, or by 1 / |y|², tokens of enormous norm would count all, or nothing.
    """
    out = cast(Array, block.apply({"params": params}, x, angles))
    return jnp.sum(jnp.sum(jnp.square(out - y), axis=-1) * fisher)


def calibrate(
    decoder: Decoder,
    samples: Samples,
    stats: Mapping[str, Stats],
    dtypes: Mapping[str, np.dtype],
    kind: str,
    smoothing: Smoothing | None = None,
    *,
    settings: Search = DEFAULT,
    progress: Progress = lambda done, count: None,
) -> dict[str, np.float32]:
    """The scales by GGUF tensor name, a stack having one for all experts.

    stats: of `smoothing.measure`, without smoothing. dtypes: of the matrices whose inputs are rounded, what
    their scales are stored in. kind: of `activations`.
    Raises UserError where inputs were not measured.
    """
    part = slice(settings.few + settings.checked)
    x, _ = embedded(decoder, samples, part, settings.tokens)
    tokens, lengths = cut(samples, part, settings.tokens)
    fisher = token_fisher(decoder, tokens, lengths=lengths)
    found: dict[str, np.float32] = {}
    for at in walk(decoder, x.shape[1]):
        i, block, params, y = at.i, decoder.blocks[at.i], at.params, at.run(x)
        divisors: dict[str, Array] = {}
        if smoothing is not None:
            scales = {name: jnp.asarray(s) for name, s in smoothing.scales(i).items()}
            factors = smooth.factors_of(block, scales)
            divisors = {name: f.cols for name, f in factors.items() if f.cols is not None}
            params = smooth.smoothed(block, params, scales)
        places: dict[str, list[str]] = {}
        for name, first in shared_inputs(decoder, i).items():
            if name in dtypes:
                places.setdefault(first, []).append(name)
        matrices = [name for names in places.values() for name in names]
        here = frozenset(map(within_block, matrices))
        rounded = block.clone(rounding=STATIC_ROUNDINGS[kind], rounded=here)
        error = partial(_error_with, rounded, params, x, y, jnp.asarray(fisher[i]), at.angles)
        largest = {name: _largest(name, stats, divisors) / LARGEST[kind] for name in matrices}
        found |= _fitted(places, largest, dtypes, error)
        progress(i + 1, len(decoder.blocks))
        x = y
    return found


def _fitted(
    places: Mapping[str, list[str]],
    largest: Mapping[str, float],
    dtypes: Mapping[str, np.dtype],
    error: Callable[[Mapping[str, np.float32]], float],
) -> dict[str, np.float32]:
    """The scales of one block. places: matrices by their input. largest: scales that clip nothing."""
    chosen = {name: _stored(scale, dtypes[name]) for name, scale in largest.items()}
    for names in sorted(places.values(), key=lambda names: stage(within_block(names[0]))):
        least = np.inf
        for clip in CLIPS:
            tried = {
                **chosen,
                **{name: _stored(clip * largest[names[0]], dtypes[names[0]]) for name in names},
            }
            lost = error(tried)
            if lost >= least:
                break  # what clipping costs only grows from here
            least, chosen = lost, tried
    return chosen


def _error_with(
    block: Block,
    params: Parameters,
    x: Array,
    y: Array,
    fisher: Array,
    angles: Array,
    scales: Mapping[str, np.float32],
) -> float:
    given = {name: dict(values) for name, values in params.items()}
    for name, scale in scales.items():
        experts = params[within_block(name)]["weight"].shape[:-2]
        given[within_block(name)]["input_scale"] = jnp.full(experts, scale)
    return float(_error(block, given, x, y, fisher, angles))


def _largest(name: str, stats: Mapping[str, Stats], divisors: Mapping[str, Array]) -> float:
    """max|x| of the inputs of a matrix once they are smoothed."""
    if name not in stats:
        raise UserError(f"{name}: nothing is known of its inputs; measure them on this model.")
    absmax = np.asarray(stats[name]["absmax"])
    divisor = divisors.get(within_block(name))
    return float(np.max(absmax if divisor is None else absmax / np.asarray(divisor)))


def _stored(scale: float, dtype: np.dtype) -> np.float32:
    """As the folder will have it; 1 for inputs that are all 0."""
    rounded = np.float32(np.asarray(scale, dtype))
    return rounded if rounded > 0 else np.float32(1)
