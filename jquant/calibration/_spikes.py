"""Super weights: single weights without which a model is lost. Two ways to find them, and a measure.

A *spike* is made by a weight W[row, column] of a down projection: on one token of any prompt its input is far
above usual in one column, its output in one row, and the product of the two with the weight between them is
most of that output. Weights are searched block by block on one prompt, those found are taken out, and the
search is repeated until there is none, for one may hide another. In a stack of experts each is judged on the
tokens that the router sends to it.

Source: Yu et al. 2024, The Super Weight in Large Language Models, section 3.1. They read spikes off plots;
here a spike is SPIKE times what is usual: the median over tokens of each token's largest magnitude and, for
the output, the median over rows on the same token. Without the latter, a spike of the input would make super
weights of a whole column of ordinary ones. What is usual in a stack, all its experts say together: one expert
may be given no token but that of the spike.

A *gradient* finds weights of any matrix: `most_sensitive` names candidates from squared gradients on a text.

Either is no more than a suspicion: `judged` tells those whose removal does raise the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.calibration._walk import Turn, walk
from jquant.core import BlockwiseModel
from jquant.models import run_and_show

SPIKE = 20.0
SHARE = 0.5  # of the output, that comes through the one weight
ROUNDS = 8  # of searching again without those found
HARMFUL = 0.1  # nats a token: perplexity rises by 10% without a super weight
DOWN = ("ffn_down", "ffn_down_exps", "ffn_down_shexp")  # where spikes are searched
DENSE, STACK = DOWN[:2]


class Place(NamedTuple):
    """Where a weight is in its block: a matrix and (row, column), a stack and (expert, row, column)."""

    tensor: str
    at: tuple[int, ...]


# block → weights to leave out; (row, column) alone is of ffn_down
Removed = Mapping[int, Sequence[Place | tuple[int, int]]]


@dataclass(frozen=True)
class SuperWeight:
    block: int
    row: int
    column: int
    value: float
    input: float | None = None  # what the weight is multiplied by, on the token of the spike
    output: float | None = None  # the spike
    spike: float | None = None  # the output by what is usual in this block
    loss_change: float | None = None  # of the mean negative log-likelihood, nats a token, without this weight
    tensor: str = DENSE
    expert: int | None = None  # in a stack
    found_by: tuple[str, ...] = ("spike",)  # and "gradient"

    @property
    def place(self) -> Place:
        stacked = () if self.expert is None else (self.expert,)
        return Place(self.tensor, (*stacked, self.row, self.column))

    @property
    def key(self) -> tuple[int, Place]:
        return self.block, self.place


class Found(NamedTuple):
    """Each with what its removal does to the loss."""

    harmful: list[SuperWeight]
    harmless: list[SuperWeight]  # they make a spike, but the model does not need it


def find(model: BlockwiseModel, tokens: Int[np.ndarray, "1 t"]) -> list[SuperWeight]:
    """Those of a model's down projections that make spikes on a prompt of a few tokens, by block."""
    found: dict[tuple[int, Place], SuperWeight] = {}
    for _ in range(ROUNDS):
        new = [w for w in _search(model, tokens, _by_block(found)) if w.key not in found]
        if not new:
            break
        found |= {w.key: w for w in new}
    return [found[key] for key in sorted(found)]


def with_loss_changes(
    model: BlockwiseModel, weights: Sequence[SuperWeight], tokens: Int[np.ndarray, "s t"]
) -> list[SuperWeight]:
    """The same weights, each with what its removal alone does to the loss on `tokens`."""
    x = jnp.asarray(model.embed(tokens))
    without: dict[int, Array] = {}  # activations of the model without weight k, from its block on
    for at in walk(model, tokens.shape[1]):  # each is loaded once for all weights
        without = {k: at.run(y) for k, y in without.items()}
        for k, w in enumerate(weights):
            if w.block == at.i:
                without[k] = _without(at, [w.place]).run(x)
        x = at.run(x)
    base = _loss(model, x, tokens)
    return [replace(w, loss_change=_loss(model, without[k], tokens) - base) for k, w in enumerate(weights)]


def united(a: Sequence[SuperWeight], b: Sequence[SuperWeight]) -> list[SuperWeight]:
    """Both lists as one, by block; what is in both is found by both."""
    found = {w.key: w for w in a}
    for w in b:
        twin = found.get(w.key)
        found[w.key] = w if twin is None else replace(twin, found_by=(*twin.found_by, *w.found_by))
    return [found[key] for key in sorted(found)]


def most_sensitive(
    name: str,
    fisher: Float[np.ndarray, "*stack out in"],
    weight: Float[np.ndarray, "*stack out in"],
    count: int,
) -> list[tuple[float, SuperWeight]]:
    """The `count` weights of one matrix, or stack, whose removal is expected to raise the loss most, and by
    how much it is, largest first.

    name: GGUF's, blk.3.attn_q.weight. fisher: the Fisher diagonal of the loss on some text.
    """
    # Removing w is the change −w: L(0) − L(w) = −w g + ½ w² h + O(w³), with h the curvature, for which the
    # Fisher diagonal F stands. The first term is left out. Of the best weight of each of SmolLM2-135M's down
    # projections, on 512 tokens, the six largest ½ w² F raise the loss by 2.57 nats a token in all, the six
    # largest |w g| by 2.44, the six largest sums of both terms by 2.32. W[507, 1229] of block 11 has w g =
    # −0.10 and ½ w² F = 1.26, where 2.05 is true.
    score = 0.5 * fisher * weight * weight
    _, block, tensor, _ = name.split(".")
    found = []
    flat = score.ravel()
    best = np.argpartition(-flat, min(count, flat.size) - 1)[:count]
    for at in best[np.argsort(-flat[best])]:
        index = tuple(int(i) for i in np.unravel_index(at, score.shape))
        *stacked, row, column = index
        found.append((
            float(score[index]),
            SuperWeight(
                int(block), row, column, float(weight[index]), tensor=tensor,
                expert=stacked[0] if stacked else None, found_by=("gradient",),
            ),
        ))  # fmt: skip
    return found


def judged(weights: Sequence[SuperWeight]) -> Found:
    """By whether their removal raises the loss by HARMFUL. Harmless ones without a spike are dropped."""
    bad = [w for w in weights if w.loss_change is not None and w.loss_change >= HARMFUL]
    return Found(bad, [w for w in weights if "spike" in w.found_by and w not in bad])


def loss(model: BlockwiseModel, tokens: Int[np.ndarray, "s t"], removed: Removed | None = None) -> float:
    """Mean negative log-likelihood of each token but the first, nats; `removed` weights are zero."""
    x = jnp.asarray(model.embed(tokens))
    for at in walk(model, tokens.shape[1]):
        x = _without(at, (removed or {}).get(at.i, ())).run(x)
    return _loss(model, x, tokens)


def _loss(model: BlockwiseModel, x: Array, tokens: np.ndarray) -> float:
    logp = jax.nn.log_softmax(model.logits(x)[:, :-1], axis=-1)
    picked = jnp.take_along_axis(logp, jnp.asarray(tokens[:, 1:], jnp.int32)[..., None], axis=-1)
    return -float(jnp.mean(picked))


def _by_block(found: Iterable[tuple[int, Place]]) -> dict[int, list[Place | tuple[int, int]]]:
    out: dict[int, list[Place | tuple[int, int]]] = {}
    for block, place in found:
        out.setdefault(block, []).append(place)
    return out


def _without(at: Turn, removed: Sequence[Place | tuple[int, int]]) -> Turn:
    params = at.params
    for place in removed:
        tensor, index = place if isinstance(place, Place) else Place(DENSE, place)
        weight = params[tensor]["weight"].at[index].set(0.0)
        params = {**params, tensor: {**params[tensor], "weight": weight}}
    return at._replace(params=params)


def _search(model: BlockwiseModel, tokens: np.ndarray, removed: Removed) -> list[SuperWeight]:
    x, spikes = jnp.asarray(model.embed(tokens)), []
    for at in walk(model, tokens.shape[1]):
        i, block, params, angles = _without(at, removed.get(at.i, ()))
        x, inputs = run_and_show(block, params, x, angles, tuple(name for name in DOWN if name in params))
        for name, shown in inputs.items():
            inputs, weight = (np.asarray(a) for a in (shown["x"], params[name]["weight"]))
            if name == STACK:
                spikes += _spikes_of_experts(
                    i, inputs, np.asarray(shown["expert"]), np.asarray(shown["token"]), weight
                )
            else:
                rows = inputs.reshape(-1, inputs.shape[-1])
                outputs = rows @ weight.T
                spikes += [
                    replace(w, tensor=name)
                    for w in _spikes(i, rows, outputs, weight, _usual(rows), _usual(outputs))
                ]
    return spikes


def _spikes_of_experts(
    block: int,
    x: Float[np.ndarray, "tiles tile in"],
    expert: Int[np.ndarray, " tiles"],
    token: Int[np.ndarray, "tiles tile"],
    weight: Float[np.ndarray, "experts out in"],
) -> list[SuperWeight]:
    inputs = {int(e): x[expert == e][token[expert == e] >= 0] for e in np.unique(expert)}
    inputs = {e: rows for e, rows in inputs.items() if len(rows)}
    outputs = {e: rows @ weight[e].T for e, rows in inputs.items()}
    usual_x, usual_y = (_usual(np.concatenate(list(parts.values()))) for parts in (inputs, outputs))
    return [
        replace(w, tensor=STACK, expert=e)
        for e, rows in inputs.items()
        for w in _spikes(block, rows, outputs[e], weight[e], usual_x, usual_y)
    ]


def _spikes(
    block: int,
    x: Float[np.ndarray, "t in"],
    y: Float[np.ndarray, "t out"],
    weight: Float[np.ndarray, "out in"],
    usual_x: float,
    usual_y: float,
) -> list[SuperWeight]:
    """The weight behind the largest output of a matrix, if that is a spike; else nothing."""
    token, row = np.unravel_index(np.abs(y).argmax(), y.shape)
    column = int(np.abs(x[token]).argmax())
    value, into, out = float(weight[row, column]), float(x[token, column]), float(y[token, row])
    spike = abs(out) / usual_y
    others = max(float(np.median(np.abs(y[token]))), float(np.finfo(np.float32).tiny))
    stands_out = min(spike, abs(out) / others, abs(into) / usual_x) >= SPIKE
    if not stands_out or into * value / out < SHARE:
        return []
    return [SuperWeight(block, int(row), column, value, into, out, spike)]


def _usual(a: Float[np.ndarray, "t width"]) -> float:
    return max(float(np.median(np.abs(a).max(axis=1))), float(np.finfo(np.float32).tiny))
