"""Factors that smooth a model, searched block by block for the least output error in 8 bits.

A block's output on samples of text is compared with what it gives once its weights and inputs are rounded.
Three steps, each from the best so far: one alpha for the whole block; for each place an alpha, then factors
channel by channel, by an estimate of what is lost there (`transforms.place_search`); factors in front of
attention, of which that estimate knows little, by Adam on the block's error itself (`smooth_error`).

What is kept is the best on samples of its own, which the steps have not seen: never worse there than the best
alpha, or than no smoothing. There, a token's error counts what it costs the model's predictions
(`token_fisher`), too dear to be known of all the others.
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
from jaxtyping import Float

from jquant.calibration import Progress, Stats, token_fisher
from jquant.io.findings import Findings
from jquant.models import Block, Decoder, Parameters, Rounding
from jquant.smoothquant import _smooth as smooth
from jquant.smoothquant._block_error import STEPS, Data, Logs, by_range, by_token, error
from jquant.smoothquant._channels import DESCENT, Descent, Seen, descend, estimate
from jquant.smoothquant._passes import cut, through_blocks
from jquant.smoothquant._smooth import Coupling
from jquant.smoothquant.smoothing import Place, Smoothing, described, maxima
from jquant.text.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Search:
    alphas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    samples: int = 40  # that places are searched on
    checked: int = 4  # that decide
    tokens: int = 256  # of each
    places: Descent = DESCENT
    few: int = 2  # of the samples, that steps on the block's error see
    steps: int = 10  # of them, at most
    every: int = 5  # steps between two checks
    patience: int = 2  # checks without a gain that end it
    rate: float = 0.03


DEFAULT = Search()
ROWS = 4096  # of a matrix, that tell what channels cost it
TOKENS = 2048  # that tell which alpha suits a place


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _adam(
    block: Block,
    quantized: frozenset[str],
    settings: Search,
    rounding: Rounding,
    params: Parameters,
    fixed: Logs,
    logs: Logs,
    state: optax.OptState,
    data: Data,
    angles: Array,
) -> tuple[Logs, optax.OptState]:
    """A few steps of these places, the others fixed."""
    optimizer = _optimizer(settings)

    def step(carry: tuple[Logs, optax.OptState], _: None) -> tuple[tuple[Logs, optax.OptState], None]:
        logs, state = carry
        # Relative errors are tiny; Adam does not mind, and their logarithm has gradients of a usual size.
        gradient = jax.grad(
            lambda logs: jnp.log(error(block, quantized, params, {**fixed, **logs}, data, angles, rounding))
        )(logs)
        finite = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of counts
            updates, state = optimizer.update(finite, state)
        moved = cast(Logs, optax.apply_updates(logs, updates))
        limit = float(np.log(smooth.SPAN))
        return (jax.tree.map(lambda a: jnp.clip(a, -limit, limit), moved), state), None

    return lax.scan(step, (logs, state), None, length=settings.every)[0]


def _optimizer(settings: Search) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(settings.rate, max(settings.steps, 1), alpha=0.1))


class Found(NamedTuple):
    logs: Logs
    alphas: dict[str, float | None]  # None: searched, or 0 where all logs are 0
    before: float  # error without smoothing, on the samples that decide
    alpha: float  # the least error of one alpha, on these
    after: float

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, for `Findings`. NaN is the alpha that is none."""
        alphas = {name: np.array(np.nan if a is None else a) for name, a in self.alphas.items()}
        return {
            **{f"{name}|log": np.asarray(log) for name, log in self.logs.items()},
            **{f"{name}|alpha": alpha for name, alpha in alphas.items()},
            "errors": np.array([self.before, self.alpha, self.after]),
        }

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Found:
        logs = {key.removesuffix("|log"): jnp.asarray(a) for key, a in arrays.items() if key.endswith("|log")}
        alphas = {name: float(arrays[f"{name}|alpha"]) for name in logs}
        return cls(
            logs,
            {name: None if np.isnan(alpha) else alpha for name, alpha in alphas.items()},
            *(float(error) for error in arrays["errors"]),
        )


def search_block(
    block: Block,
    quantized: frozenset[str],
    params: Parameters,
    inputs: Mapping[str, Array],
    shown: Mapping[str, Array],
    train: Data,
    check: Data,
    angles: Array,
    settings: Search = DEFAULT,
    rounding: Rounding = by_token,
) -> Found:
    """The factors of one block. inputs: max|x| of the channels of each place. shown: what its matrices are
    given of `train`, by place. rounding: of inputs."""
    places = smooth.couplings(block)
    before_mixing = {place.name for place in places if place.before_mixing}
    weights = {place.name: smooth.weight_maxima(place, params) for place in places}
    none: Logs = {place.name: jnp.zeros(place.shape, jnp.float32) for place in places}

    def at(name: str, alpha: float | None) -> Array:
        return none[name] if alpha is None else smooth.smooth(inputs[name], weights[name], alpha)

    best: list[tuple[float, Logs, dict[str, float | None]]] = []

    def consider(logs: Logs, alphas: Mapping[str, float | None]) -> float:
        found = float(error(block, quantized, params, logs, check, angles, rounding))
        best.append((found if np.isfinite(found) else np.inf, logs, dict(alphas)))
        return best[-1][0]

    def least() -> tuple[float, Logs, dict[str, float | None]]:
        return min(best, key=lambda found: found[0])

    before = consider(none, dict.fromkeys(none))
    for alpha in settings.alphas:
        consider({name: at(name, alpha) for name in none}, dict.fromkeys(none, alpha))
    one_alpha, logs, alphas = least()

    own: Logs = {}
    steps = STEPS[rounding]
    for place, seen in _seen(block, quantized, params, shown, logs, train, check, angles, rounding):
        name = place.name
        lost = {a: float(estimate(place, at(name, a), _part(seen), steps)) for a in (None, *settings.alphas)}
        alpha = min(lost, key=lambda a: lost[a])
        logs, alphas = {**logs, name: at(name, alpha)}, {**alphas, name: alpha}
        own[name] = descend(place, logs[name], seen, settings.places, steps)
    consider(logs, alphas)
    consider({**logs, **own}, {**alphas, **dict.fromkeys(own)})
    for name, found in own.items():
        _, logs, alphas = least()
        consider({**logs, name: found}, {**alphas, name: None})

    _, fixed, alphas = least()
    first = slice(settings.few)
    tokens = slice(settings.few * train.x.shape[1])
    few = Data(train.x[first], train.y[first], train.weight[tokens], train.fisher[tokens])
    logs = {name: fixed[name] for name in fixed if name not in own or name in before_mixing}
    state, waited = _optimizer(settings).init(logs), 0
    for _ in range(0, settings.steps, settings.every):
        logs, state = _adam(block, quantized, settings, rounding, params, fixed, logs, state, few, angles)
        so_far, *_ = least()
        after = consider({**fixed, **logs}, {**alphas, **dict.fromkeys(logs)})
        waited = 0 if after < so_far else waited + 1
        if waited == settings.patience:
            break
    after, logs, alphas = least()
    return Found(logs, alphas, before, one_alpha, after)


def _seen(
    block: Block,
    quantized: frozenset[str],
    params: Parameters,
    shown: Mapping[str, Array],
    logs: Logs,
    train: Data,
    check: Data,
    angles: Array,
    rounding: Rounding,
) -> Iterator[tuple[Coupling, Seen]]:
    """What is known of each place, but of experts that have channels of their own.

    What the rows of a matrix count is found at log s: by the block's error with this matrix alone rounded.
    """
    rng = np.random.default_rng(0)
    for place in smooth.couplings(block):
        consumers = [n for n in smooth.without_routers(place.consumers) if n in quantized]
        if place.experts is not None or not consumers:
            continue
        x = shown[place.name]
        order = rng.permutation(len(x))
        counts = train.weight if place.before_mixing else train.fisher
        x, tokens = x[order], (counts / jnp.sum(counts))[order]
        alone = []
        for name in consumers:
            rows = _some(params[name]["weight"], x.shape[1], rng)
            felt = error(block, quantized, params, logs, check, angles, rounding, only=[name])
            own = Seen(x, tokens, rows, jnp.ones(len(rows)))
            expected = estimate(place, logs[place.name], _part(own), STEPS[rounding])
            alone.append((rows, jnp.full(len(rows), felt / jnp.where(expected > 0, expected, 1.0))))
        rows, counts = (jnp.concatenate(parts) for parts in zip(*alone, strict=True))
        mixed = rng.permutation(len(rows))
        yield place, Seen(x, tokens, rows[mixed], counts[mixed])


def _part(seen: Seen) -> Seen:
    """By some of the tokens, which are in no order."""
    tokens = seen.tokens[:TOKENS]
    return seen._replace(x=seen.x[:TOKENS], tokens=tokens / jnp.sum(tokens))


def _some(weight: Array, width: int, rng: np.random.Generator) -> Float[Array, "rows width"]:
    """Rows of a matrix, or of a stack of them."""
    rows = weight.reshape(-1, width)
    return rows if len(rows) <= ROWS else rows[np.sort(rng.choice(len(rows), ROWS, replace=False))]


def search(
    decoder: Decoder,
    samples: Samples,
    stats: Mapping[str, Stats],
    quantized: frozenset[str],
    fisher: Float[np.ndarray, "blocks s t"],
    *,
    settings: Search = DEFAULT,
    rounding: Rounding = by_token,
    findings: Findings | None = None,
    progress: Progress = lambda done, count: None,
) -> Smoothing:
    """The factors of all blocks. quantized: GGUF names of the matrices that will be rounded. fisher: see
    `fisher_of`. rounding: of inputs, one of `STEPS`. With a zero, channels change their sign too, where that
    makes the ranges of tokens smaller: s is negative. findings: blocks that an interrupted run has searched
    are recalled.

    Every block is searched on what the original gives it. In memory are one block, activations of `samples` +
    `checked` samples of `tokens` tokens, and what the block's matrices are given of the former.
    """
    places: list[Place] = []
    found_errors: list[tuple[float, float]] = []
    parts = _parts(samples, settings)
    for i, block, params, angles, passed in through_blocks(
        decoder, samples, parts, settings.tokens, (None, fisher)
    ):
        (data, shown), (checked, _) = passed
        here = _within(quantized, i)
        found_places = smooth.couplings(block)
        inputs = {place.name: maxima(place, i, stats) for place in found_places}
        signs = _signs(found_places, shown) if rounding is by_range else {}
        params = smooth.smoothed(block, params, signs)
        shown |= {
            p.name: shown[p.name] * smooth.of_inputs(p, signs[p.name])[None]
            for p in found_places
            if p.name in signs
        }
        known = findings and findings.recall("searched", i)
        if known:
            found = Found.of(known)
        else:
            found = search_block(
                block, here, params, inputs, shown, data, checked, angles, settings, rounding
            )
            if findings is not None:
                findings.remember("searched", i, found.arrays())
        told = described(i, found_places, stats, found.logs, found.alphas)
        places += [
            place._replace(scales=place.scales * np.asarray(signs.get(place.name, 1), np.float32))
            for place in told
        ]
        found_errors.append((found.before, found.after))
        progress(i + 1, len(decoder.blocks))
    return Smoothing(tuple(places), tuple(found_errors))


def _signs(places: Sequence[Coupling], shown: Mapping[str, Array]) -> dict[str, Array]:
    """1 or −1 for each channel: that of its large values."""
    return {place.name: _sign(place, shown[place.name]) for place in places if place.name in shown}


@partial(jax.jit, static_argnums=0)
def _sign(place: Coupling, x: Float[Array, "n width"]) -> Float[Array, " channels"]:
    size = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))
    skew = jnp.sum((x / jnp.where(size > 0, size, 1.0)) ** 3, axis=0)
    gives, takes = place.heads or (1, 1)
    skew = jnp.sum(skew.reshape(gives, takes, -1), axis=1).reshape(-1)
    return jnp.where(skew < 0, -1.0, 1.0)


def judged(
    decoder: Decoder,
    samples: Samples,
    smoothing: Smoothing,
    quantized: frozenset[str],
    fisher: Float[np.ndarray, "blocks s t"],
    *,
    settings: Search = DEFAULT,
    rounding: Rounding = by_token,
) -> Smoothing:
    """The smoothing with `kept`, and `errors` where the search has not measured them, on the samples that
    decide in the search."""
    judges = partial(_judges, decoder, samples, smoothing, quantized, fisher, settings, rounding)
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
    fisher: Float[np.ndarray, "blocks s t"],
    settings: Search,
    rounding: Rounding,
) -> Iterator[tuple[int, Block, Logs, Callable[..., float]]]:
    """Block after block its number, itself, its log s, and `_lost` of others and of matrices left alone."""
    _, judge = _parts(samples, settings)
    blocks = through_blocks(decoder, samples, [judge], settings.tokens, [fisher])
    for i, block, params, angles, passed in blocks:
        check = passed[0].data
        scales = {name: jnp.asarray(s) for name, s in smoothing.scales(i).items()}
        logs = {name: jnp.log(jnp.abs(s)) for name, s in scales.items()}
        params = smooth.smoothed(block, params, {name: jnp.sign(s) for name, s in scales.items()})
        yield i, block, logs, partial(_lost, block, _within(quantized, i), params, check, angles, rounding)


def _lost(
    block: Block,
    quantized: frozenset[str],
    params: Parameters,
    check: Data,
    angles: Array,
    rounding: Rounding,
    logs: Logs,
    alone: Sequence[str] = (),
) -> float:
    """The block's error, these of its matrices not rounded."""
    rounded = quantized.difference(alone)
    return float(error(block, quantized, params, logs, check, angles, rounding, only=rounded))


def fisher_of(
    decoder: Decoder, samples: Samples, settings: Search = DEFAULT, *, batch: int = 4
) -> Float[np.ndarray, "blocks s t"]:
    """What errors cost at the tokens that decide."""
    _, part = _parts(samples, settings)
    tokens, lengths = cut(samples, part, settings.tokens)
    return token_fisher(decoder, tokens, lengths=lengths, batch=batch)


def _parts(samples: Samples, settings: Search) -> tuple[slice, slice]:
    """The samples that steps see, and those that decide."""
    count = len(samples.tokens)
    if count == 1:  # it has to serve for both
        return slice(0, 1), slice(0, 1)
    checked = min(settings.checked, count // 2)
    seen = min(settings.samples, count - checked)
    return slice(0, seen), slice(seen, seen + checked)


def _within(quantized: frozenset[str], i: int) -> frozenset[str]:
    return frozenset(n.split(".")[2] for n in quantized if n.startswith(f"blk.{i}."))
