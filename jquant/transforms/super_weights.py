"""Super weights: single weights of down projections without which a model is lost.

Such a weight W[row, column] makes a spike: on one token of any prompt the input of the down projection is far
above usual in one column, its output in one row, and the product of the two with the weight between them is
most of that output. Weights are searched block by block on one prompt, those found are taken out, and the
search is repeated until there is none, for one may hide another.

Source: Yu et al. 2024, The Super Weight in Large Language Models, section 3.1. They read spikes off plots;
here a spike is SPIKE times what is usual: the median over tokens of each token's largest magnitude and, for
the output, the median over rows on the same token. Without the latter, a spike of the input would make super
weights of a whole column of ordinary ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.core import Block, BlockwiseModel

SPIKE = 20.0
SHARE = 0.5  # of the output, that comes through the one weight
ROUNDS = 8  # of searching again without those found

Removed = Mapping[int, Sequence[tuple[int, int]]]  # block → (row, column) of its down projection


@dataclass(frozen=True)
class SuperWeight:
    block: int
    row: int
    column: int
    value: float
    input: float  # what the weight is multiplied by, on the token of the spike
    output: float  # the spike
    spike: float  # the output by what is usual in this block
    loss_change: float | None = None  # of the mean negative log-likelihood, nats a token, without this weight


def find(model: BlockwiseModel, tokens: Int[np.ndarray, "1 t"]) -> list[SuperWeight]:
    """The super weights of a model's dense down projections, on a prompt of a few tokens, by block.

    Stacks of experts are not searched.
    """
    found: dict[tuple[int, int, int], SuperWeight] = {}
    for _ in range(ROUNDS):
        removed = _by_block(found)
        new = [w for w in _search(model, tokens, removed) if (w.block, w.row, w.column) not in found]
        if not new:
            break
        found |= {(w.block, w.row, w.column): w for w in new}
    return [found[key] for key in sorted(found)]


def with_loss_changes(
    model: BlockwiseModel, weights: Sequence[SuperWeight], tokens: Int[np.ndarray, "s t"]
) -> list[SuperWeight]:
    """The same weights, each with what its removal alone does to the loss on `tokens`."""
    base = loss(model, tokens)
    return [
        replace(w, loss_change=loss(model, tokens, {w.block: [(w.row, w.column)]}) - base) for w in weights
    ]


def loss(model: BlockwiseModel, tokens: Int[np.ndarray, "s t"], removed: Removed | None = None) -> float:
    """Mean negative log-likelihood of each token but the first, nats; `removed` weights are zero."""
    x = jnp.asarray(model.embed(tokens))
    for i, block in enumerate(model.blocks):
        params = _without(model.load_block(i), (removed or {}).get(i, ()))
        x = _run(block, params, x, jnp.asarray(model.angles(i, tokens.shape[1])))[0]
    logp = jax.nn.log_softmax(model.logits(x)[:, :-1], axis=-1)
    picked = jnp.take_along_axis(logp, jnp.asarray(tokens[:, 1:], jnp.int32)[..., None], axis=-1)
    return -float(jnp.mean(picked))


def _by_block(found: Mapping[tuple[int, int, int], SuperWeight]) -> dict[int, list[tuple[int, int]]]:
    out: dict[int, list[tuple[int, int]]] = {}
    for block, row, column in found:
        out.setdefault(block, []).append((row, column))
    return out


def _without(params: dict[str, dict[str, Array]], removed: Sequence[tuple[int, int]]) -> dict:
    if not removed:
        return params
    down = params["ffn_down"]
    rows, columns = (jnp.array(index) for index in zip(*removed, strict=True))
    return {**params, "ffn_down": {**down, "weight": down["weight"].at[rows, columns].set(0.0)}}


@partial(jax.jit, static_argnums=0)
def _run(block: Block, params: Mapping, x: Array, angles: Array) -> tuple[Array, Array | None]:
    """(output of the block, input of its down projection where it has one)"""
    y, shown = block.apply({"params": params}, x, angles, mutable="inputs")
    down = shown["inputs"].get("ffn_down")
    return y, None if down is None else down["x"]


def _search(model: BlockwiseModel, tokens: np.ndarray, removed: Removed) -> list[SuperWeight]:
    x, found = jnp.asarray(model.embed(tokens)), []
    for i, block in enumerate(model.blocks):
        params = _without(model.load_block(i), removed.get(i, ()))
        x, inputs = _run(block, params, x, jnp.asarray(model.angles(i, tokens.shape[1])))
        if inputs is not None:
            found += _spikes(i, np.asarray(inputs[0]), np.asarray(params["ffn_down"]["weight"]))
    return found


def _spikes(
    block: int, x: Float[np.ndarray, "t in"], weight: Float[np.ndarray, "out in"]
) -> list[SuperWeight]:
    """The weight behind the largest output of a block, if that is a spike; else nothing."""
    y = x @ weight.T
    token, row = np.unravel_index(np.abs(y).argmax(), y.shape)
    column = int(np.abs(x[token]).argmax())
    value, given, made = float(weight[row, column]), float(x[token, column]), float(y[token, row])
    spike = abs(made) / _usual(y)
    others = max(float(np.median(np.abs(y[token]))), float(np.finfo(np.float32).tiny))
    stands_out = min(spike, abs(made) / others, abs(given) / _usual(x)) >= SPIKE
    if not stands_out or given * value / made < SHARE:
        return []
    return [SuperWeight(block, int(row), column, value, given, made, spike)]


def _usual(a: Float[np.ndarray, "t width"]) -> float:
    return max(float(np.median(np.abs(a).max(axis=1))), float(np.finfo(np.float32).tiny))
