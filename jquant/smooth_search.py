"""Factors that smooth a model, searched block by block for the least output error in 8 bits.

A block's output on samples of text is compared with what it gives once its weights and inputs are rounded.
Three steps, each from the best so far: one alpha for the whole block; an alpha for each place; the factors
themselves, channel by channel, by Adam on log s. Rounding passes gradients on as if it were nothing, but for
the scale that its error is counted in: a larger scale makes a larger error.

What is kept is the best on samples of its own, which the steps have not seen: never worse there than the best
alpha, or than no smoothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.activations import LARGEST, int8, static_int8
from jquant.calibrate import Progress, Stats, embed_into, real_tokens, weights_of
from jquant.io.samples import Samples
from jquant.models import Block, Decoder, Parameters, Rounding, run_block
from jquant.smoothing import Place, Smoothing, described, maxima
from jquant.transforms import smooth

Logs = dict[str, Array]  # log s by the name of the place


@dataclass(frozen=True, kw_only=True)
class Search:
    alphas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    samples: int = 2  # that the steps see
    checked: int = 2  # that decide
    tokens: int = 256  # of each
    steps: int = 40  # of Adam, at most
    every: int = 5  # steps between two checks
    patience: int = 2  # checks without a gain that end it
    rate: float = 0.03


DEFAULT = Search()


class _Data(NamedTuple):
    x: Array  # what goes into the block, [s, t, width]
    y: Array  # what comes out of it in float32
    weight: Array  # 1 for a real token, 0 for padding, [s · t]


def _round(x: Array, scale: Array, codes: Array) -> Array:
    """scale · codes for the nearest codes of x. The rounding error, in units of the scale, is a constant."""
    error = lax.stop_gradient(codes.astype(jnp.float32) - x / scale)
    return x + scale * error


def by_token(x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
    """Inputs rounded each token by a scale of its own."""
    codes, scale = int8(lax.stop_gradient(x))
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(absmax > 0, absmax / LARGEST["int8"], scale)
    return _round(x, jnp.broadcast_to(scale, x.shape), codes)


def by_tensor(x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
    """Inputs rounded by one scale, that of the largest here."""
    absmax = jnp.max(jnp.abs(x))
    scale = jnp.broadcast_to(jnp.where(absmax > 0, absmax / LARGEST["int8"], 1.0), x.shape)
    return _round(x, scale, static_int8(*lax.stop_gradient((x, scale))).codes)


def _rounded_weights(w: Float[Array, "*rows cols"]) -> Float[Array, "*rows cols"]:
    """Without the search for the clip, which finds little in 8 bits."""
    absmax = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    scale = jnp.broadcast_to(jnp.where(absmax > 0, absmax / 127.0, 1.0), w.shape)
    return _round(w, scale, jnp.round(lax.stop_gradient(w / scale)))


def _error(
    block: Block,
    quantized: frozenset[str],
    params: Parameters,
    logs: Logs,
    data: _Data,
    angles: Array,
    rounding: Rounding = by_token,
) -> Array:
    """Mean over tokens of |ŷ − y|² / |y|²: the norm behind the block divides each token by its size."""
    made = smooth.smoothed(block, params, jax.tree.map(jnp.exp, logs))
    for name in quantized:
        made[name] = {**made[name], "weight": _rounded_weights(made[name]["weight"])}
    rounded = block.clone(rounding=rounding, rounded=quantized)
    out = cast(Array, rounded.apply({"params": made}, data.x, angles))
    lost = jnp.sum(jnp.square(out - data.y), axis=-1) / jnp.sum(jnp.square(data.y), axis=-1)
    return jnp.sum(lost.reshape(-1) * data.weight) / jnp.sum(data.weight)


error = partial(jax.jit, static_argnums=(0, 1, 6))(_error)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _adam(
    block: Block,
    quantized: frozenset[str],
    settings: Search,
    rounding: Rounding,
    params: Parameters,
    logs: Logs,
    state: optax.OptState,
    data: _Data,
    angles: Array,
) -> tuple[Logs, optax.OptState]:
    """A few steps."""
    optimizer = _optimizer(settings)

    def step(carry: tuple[Logs, optax.OptState], _: None) -> tuple[tuple[Logs, optax.OptState], None]:
        logs, state = carry
        # Relative errors are tiny; Adam does not mind, and their logarithm has gradients of a usual size.
        gradient = jax.grad(
            lambda logs: jnp.log(_error(block, quantized, params, logs, data, angles, rounding))
        )(logs)
        finite = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of counts
            updates, state = optimizer.update(finite, state)
        moved = cast(Logs, optax.apply_updates(logs, updates))
        limit = float(np.log(smooth.SPAN))
        return (jax.tree.map(lambda a: jnp.clip(a, -limit, limit), moved), state), None

    return lax.scan(step, (logs, state), None, length=settings.every)[0]


def _optimizer(settings: Search) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(settings.rate, settings.steps, alpha=0.1))


class Found(NamedTuple):
    logs: Logs
    alphas: dict[str, float | None]  # None: searched, or 0 where all logs are 0
    before: float  # error without smoothing, on the samples that decide
    alpha: float  # the least error of one alpha, on these
    after: float


def search_block(
    block: Block,
    quantized: frozenset[str],
    params: Parameters,
    inputs: Mapping[str, Array],
    train: _Data,
    check: _Data,
    angles: Array,
    settings: Search = DEFAULT,
    rounding: Rounding = by_token,
) -> Found:
    """The factors of one block. inputs: max|x| of the channels of each place. rounding: of inputs."""
    places = smooth.couplings(block)
    weights = {place.name: smooth.weight_maxima(place, params) for place in places}
    none: Logs = {place.name: jnp.zeros(place.shape, jnp.float32) for place in places}

    def at(name: str, alpha: float | None) -> Array:
        return none[name] if alpha is None else smooth.smooth(inputs[name], weights[name], alpha)

    def on(data: _Data, logs: Logs) -> float:
        found = float(error(block, quantized, params, logs, data, angles, rounding))
        return found if np.isfinite(found) else np.inf

    best: list[tuple[float, Logs, dict[str, float | None]]] = []

    def consider(logs: Logs, alphas: Mapping[str, float | None]) -> float:
        best.append((on(check, logs), logs, dict(alphas)))
        return best[-1][0]

    before = consider(none, dict.fromkeys(none))
    grids: list[tuple[float, float | None, Logs]] = [(on(train, none), None, none)]
    for alpha in settings.alphas:
        logs = {name: at(name, alpha) for name in none}
        consider(logs, dict.fromkeys(none, alpha))
        grids.append((on(train, logs), alpha, logs))
    one_alpha = min(e for e, *_ in best)

    least, alpha, logs = min(grids, key=lambda found: found[0])
    alphas: dict[str, float | None] = dict.fromkeys(none, alpha)
    for name in none:
        for other in (None, *settings.alphas):
            tried = {**logs, name: at(name, other)}
            found = on(train, tried)
            if found < least:
                least, logs, alphas = found, tried, {**alphas, name: other}
    consider(logs, alphas)

    _, logs, alphas = min(best, key=lambda found: found[0])
    state, waited = _optimizer(settings).init(logs), 0
    for _ in range(0, settings.steps, settings.every):
        logs, state = _adam(block, quantized, settings, rounding, params, logs, state, train, angles)
        least = min(e for e, *_ in best)
        waited = 0 if consider(logs, dict.fromkeys(none)) < least else waited + 1
        if waited == settings.patience:
            break
    after, logs, alphas = min(best, key=lambda found: found[0])
    return Found(logs, alphas, before, one_alpha, after)


def embedded(
    decoder: Decoder, samples: Samples, settings: Search
) -> tuple[Float[Array, "s t width"], Int[Array, " s"]]:
    """What goes into the first block of the samples that steps see and that decide; their real tokens."""
    tokens = samples.tokens[: settings.samples + settings.checked, : settings.tokens]
    lengths = np.minimum(real_tokens(samples.tokens, samples.lengths)[: len(tokens)], tokens.shape[1])
    x = np.empty((*tokens.shape, decoder.width), np.float32)
    embed_into(x, decoder, tokens)
    return jnp.asarray(x), jnp.asarray(lengths, jnp.int32)


def search(
    decoder: Decoder,
    samples: Samples,
    stats: Mapping[str, Stats],
    quantized: frozenset[str],
    *,
    settings: Search = DEFAULT,
    rounding: Rounding = by_token,
    progress: Progress = lambda done, count: None,
) -> Smoothing:
    """The factors of all blocks. quantized: GGUF names of the matrices that will be rounded. rounding: of
    their inputs, `by_token` or `by_tensor`.

    Every block is searched on what the original gives it. In memory are one block, and activations of
    `samples` + `checked` samples of `tokens` tokens, the first ones.
    """
    places: list[Place] = []
    found_errors: list[tuple[float, float]] = []
    for i, block, params, angles, train, check in _blocks(decoder, samples, settings):
        here = _within(quantized, i)
        found_places = smooth.couplings(block)
        inputs = {place.name: maxima(place, i, stats) for place in found_places}
        found = search_block(block, here, params, inputs, train, check, angles, settings, rounding)
        places += described(i, found_places, stats, found.logs, found.alphas)
        found_errors.append((found.before, found.after))
        progress(i + 1, len(decoder.blocks))
    return Smoothing(tuple(places), tuple(found_errors))


def judged(
    decoder: Decoder,
    samples: Samples,
    smoothing: Smoothing,
    quantized: frozenset[str],
    *,
    settings: Search = DEFAULT,
    rounding: Rounding = by_token,
) -> Smoothing:
    """The smoothing with `kept`, and `errors` where the search has not measured them, on the samples that
    decide in the search."""
    judges = partial(_judges, decoder, samples, smoothing, quantized, settings, rounding)
    if not smoothing.errors:
        none = partial(jax.tree.map, jnp.zeros_like)
        errors = tuple((lost(none(logs)), lost(logs)) for _, _, logs, lost in judges())
        smoothing = smoothing._replace(errors=errors)
    outstanding = smoothing.outstanding
    kept = {
        i: {place.name: lost(logs, place.consumers) for place in smooth.couplings(block)}
        for i, block, logs, lost in islice(judges(), max(outstanding, default=-1) + 1)
        if i in outstanding
    }
    return smoothing._replace(kept=kept)


def _judges(
    decoder: Decoder,
    samples: Samples,
    smoothing: Smoothing,
    quantized: frozenset[str],
    settings: Search,
    rounding: Rounding,
) -> Iterator[tuple[int, Block, Logs, Callable[..., float]]]:
    """Block after block its number, itself, its log s, and `_lost` of others and of matrices left alone."""
    for i, block, params, angles, _, check in _blocks(decoder, samples, settings):
        logs = {name: jnp.log(jnp.asarray(s)) for name, s in smoothing.scales(i).items()}
        yield i, block, logs, partial(_lost, block, _within(quantized, i), params, check, angles, rounding)


def _lost(
    block: Block,
    quantized: frozenset[str],
    params: Parameters,
    check: _Data,
    angles: Array,
    rounding: Rounding,
    logs: Logs,
    alone: Sequence[str] = (),
) -> float:
    """The block's error, these of its matrices not rounded."""
    return float(error(block, quantized.difference(alone), params, logs, check, angles, rounding))


def _blocks(
    decoder: Decoder, samples: Samples, settings: Search
) -> Iterator[tuple[int, Block, Parameters, Array, _Data, _Data]]:
    """Block after block its number, parameters and angles, the data that steps see, and those that decide."""
    x, real = embedded(decoder, samples, settings)
    half = max(len(x) * settings.samples // (settings.samples + settings.checked), 1)
    # A single sample has to serve for both.
    parts = slice(0, half), slice(half, None) if len(x) > 1 else slice(0, 1)
    for i, block in enumerate(decoder.blocks):
        params, angles = decoder.load_block(i), jnp.asarray(decoder.angles(i, x.shape[1]))
        y = run_block(block, params, x, angles)
        train, check = (_Data(x[p], y[p], weights_of(x[p], real[p])) for p in parts)
        yield i, block, params, angles, train, check
        x = y


def _within(quantized: frozenset[str], i: int) -> frozenset[str]:
    return frozenset(n.split(".")[2] for n in quantized if n.startswith(f"blk.{i}."))
