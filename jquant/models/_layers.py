"""What the blocks of decoders are made of, in Flax. Parameters have the names of GGUF tensors.

A matrix `blk.3.attn_q.weight` of the file is the parameter attn_q/weight of block 3.

Every product with a matrix goes through Linear or Experts, which show what they are given in the collection
"inputs": `block.apply(variables, x, angles, mutable="inputs")`. Nothing is stored unless that is asked for.
A matrix in `Block.rounded` is multiplied by what `Block.rounding` makes of its input; shown is the input.
Where it has a parameter input_scale, of a stack one for each expert, that is given to the rounding too.
What the collection "nudges" has for them, {"attn_q": {"y": …}}, is added to their outputs: the gradient with
respect to an output is that with respect to its nudge. What the collection "given" has, {"attn_q": {"x": …}},
takes the place of a Linear's input: what leads to that input alone is then not computed.

Products are of float32, or, in a block whose `precision` says so, of bfloat16 with sums in float32, which
matrix units are made for; what is shown is then bfloat16 too. Norms, softmax, and what goes from block to
block are float32 in both.

Terms. s: samples. t: tokens of a sample. g: groups of heads that share a key. r: heads of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

QUERIES = 128  # a tile of queries sees only the keys that it may: half of the work for a whole sample
TILE = 128  # tokens of one expert that are multiplied at once
# Products of float32 as such where a device would round its factors (TPU, TF32).
PRECISION = lax.Precision.HIGHEST
_EXACT: Any = {"precision": PRECISION, "preferred_element_type": jnp.float32}
SMALLEST_SUM = (
    6.103515625e-5  # llama.cpp: float16's smallest normal number, below which weights are not scaled
)

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Rounding = Callable[..., Array]  # of the inputs of a matrix: f(x [*n, width]), or f(x, scale)
Precision = Literal["float32", "bfloat16"]


class Linear(nn.Module):
    """y = x Wᵀ + b, with W as a file has it: [out, in]."""

    shape: tuple[int, ...]
    bias: bool = False
    rounding: Rounding | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*n in"]) -> Float[Array, "*n out"]:
        if self.has_variable("given", "x"):
            x = self.get_variable("given", "x")
        _show(self, x=x)
        x = _rounded(self, self.rounding, x)
        weight = self.param("weight", nn.initializers.lecun_normal(), self.shape)
        y = lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), **_EXACT)
        if self.bias:
            y = y + jnp.broadcast_to(self.param("bias", nn.initializers.zeros, self.shape[:1]), y.shape)
        return _nudged(self, y)


class Experts(nn.Module):
    """A Linear for each expert: tile i of x is multiplied by the matrix of expert[i].

    token: which token a row of x is, −1 for rows that only fill a tile; shown beside the inputs.
    """

    shape: tuple[int, ...]  # [experts, out, in]
    rounding: Rounding | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "tiles tile in"],
        expert: Int[Array, " tiles"],
        token: Int[Array, "tiles tile"],
    ) -> Float[Array, "tiles tile out"]:
        _show(self, x=x, expert=expert, token=token)
        x = _rounded(self, self.rounding, x, expert)
        weight = self.param("weight", nn.initializers.lecun_normal(batch_axis=(0,)), self.shape)
        weight = weight.astype(x.dtype)
        y = lax.map(lambda tile: jnp.dot(tile[0], weight[tile[1]].T, **_EXACT), (x, expert))
        return _nudged(self, y)


class Shown(nn.Module):
    """The place of a matrix that is not multiplied by: it shows what the matrix is given."""

    @nn.compact
    def __call__(self, x: Float[Array, "*n in"]) -> None:
        _show(self, x=x)


def _show(module: nn.Module, **inputs: Array) -> None:
    for name, value in inputs.items():
        module.sow("inputs", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: jnp.zeros(()))


def _rounded(module: nn.Module, rounding: Rounding | None, x: Array, expert: Array | None = None) -> Array:
    """expert: of each tile of x [tiles, tile, width]."""
    if rounding is None:
        return x
    if not module.has_variable("params", "input_scale"):
        return rounding(x)
    scale = module.get_variable("params", "input_scale")
    return rounding(x, scale if expert is None else scale[expert][:, None, None])


def _nudged(module: nn.Module, y: Array) -> Array:
    return y + module.get_variable("nudges", "y") if module.has_variable("nudges", "y") else y


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · w over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        return rms_norm(x, weight, self.eps)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x [*n, width], weight [width]."""
    scale = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * jnp.broadcast_to(weight, x.shape)


class Block(nn.Module, kw_only=True):
    """What every kind of block is made of. Hashable: a static jit argument; blocks of one kind are equal.

    A kind of block is a subclass with a `__call__(x, angles)`, which reaches its matrices by `_linear` and
    `_experts_of`: so they show their inputs, round them, and take nudges.

    shapes: tensors of the block, such as ("attn_q.weight", (rows, columns)).
    """

    shapes: Shapes
    eps: float
    gelu: bool = False  # else SiLU
    experts_used: int = 0
    experts_normalized: bool = True  # the weights of the experts in use sum to one
    rounding: Rounding | None = None
    rounded: frozenset[str] = frozenset()  # matrices, such as "attn_q"
    precision: Precision = "float32"  # of the factors of products

    def _factor(self, x: Array) -> Array:
        return x.astype(self.precision)

    def _has(self, name: str) -> bool:
        return f"{name}.weight" in dict(self.shapes)

    def _linear(self, name: str) -> Linear:
        shapes = dict(self.shapes)
        shape, bias = _matrix(shapes[f"{name}.weight"]), f"{name}.bias" in shapes
        return Linear(shape, bias, self._rounding_of(name), name=name)

    def _experts_of(self, name: str) -> Experts:
        return Experts(dict(self.shapes)[f"{name}.weight"], self._rounding_of(name), name=name)

    def _rounding_of(self, name: str) -> Rounding | None:
        return self.rounding if name in self.rounded else None

    def _norm(self, name: str, x: Array) -> Array:
        return RMSNorm(self.eps, name=name)(x)

    def _norm_if_any(self, name: str, x: Array) -> Array:
        return self._norm(name, x) if self._has(name) else x

    def _fed_forward(self, h: Array) -> Array:
        """h + post(down(act(gate m) · up m)), m = rmsnorm(h); of experts, where there is a router."""
        m = self._factor(self._norm("ffn_norm", h))
        fed = self._experts(m) if self._has("ffn_gate_inp") else self._feed_forward(m)
        return h + self._norm_if_any("post_ffw_norm", fed)

    def _activate(self, gate: Array) -> Array:
        return jax.nn.gelu(gate, approximate=True) if self.gelu else jax.nn.silu(gate)

    def _feed_forward(self, m: Array, suffix: str = "") -> Array:
        """down(act(gate m) · up m); without a gate of its own, `up` holds both, the gate first."""
        up = self._linear(f"ffn_up{suffix}")(m)
        if self._has(f"ffn_gate{suffix}"):
            gate = self._linear(f"ffn_gate{suffix}")(m)
        else:
            gate, up = jnp.split(up, 2, axis=-1)
        return self._linear(f"ffn_down{suffix}")(self._factor(self._activate(gate) * up))

    def _experts(self, m: Array) -> Array:
        """Σ p_e expert_e(m) over the best experts of each token, and the shared expert behind its gate."""
        s, t, width = m.shape
        flat = m.reshape(s * t, width)
        p = jax.nn.softmax(self._linear("ffn_gate_inp")(flat), axis=-1)
        p, chosen = lax.top_k(p, self.experts_used)  # [tokens, used]
        if self.experts_normalized:
            p = p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), SMALLEST_SUM)
        shapes = dict(self.shapes)
        expert, token, slot = tiles_of_experts(chosen, shapes["ffn_up_exps.weight"][0])
        x = jnp.where(token[..., None] >= 0, flat[jnp.maximum(token, 0)], 0.0)  # [tile, row, width]
        gate, up = (self._experts_of(name)(x, expert, token) for name in ("ffn_gate_exps", "ffn_up_exps"))
        hidden = self._factor(self._activate(gate) * up)
        y = self._experts_of("ffn_down_exps")(hidden, expert, token)
        out = jnp.sum(y.reshape(-1, width)[slot] * p[..., None], axis=1).reshape(m.shape)
        if self._has("ffn_up_shexp"):
            shared = self._feed_forward(m, "_shexp")
            if self._has("ffn_gate_inp_shexp"):
                shared = shared * jax.nn.sigmoid(self._linear("ffn_gate_inp_shexp")(m))
            out = out + shared
        return out


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) > 1 else (1, *shape)  # a matrix of one row is stored as a vector


def attend(
    q: Float[Array, "s t heads d"],
    k: Float[Array, "s t g d"],
    v: Float[Array, "s t g e"],
    *,
    window: int | None = None,
    softcap: float = 0.0,
) -> Float[Array, "s t heads e"]:
    """softmax(q kᵀ) v, causal, for scaled q; with a window, of the last `window` tokens only.

    Queries come in tiles, each with the keys that any of them may see: what a mask would throw away
    is mostly not computed, and the scores of a tile stay in the cache.
    """
    s, t, heads, d = q.shape
    g = k.shape[2]
    q = q.reshape(s, t, g, heads // g, d).transpose(0, 2, 3, 1, 4)  # [s, g, r, t, d]
    k, v = (y.transpose(0, 2, 1, 3) for y in (k, v))  # [s, g, t, d]
    tiles = []
    for start in range(0, t, QUERIES):
        stop = min(start + QUERIES, t)
        first = 0 if window is None else max(start - window + 1, 0)
        seen = _visible(start, stop, first, window)
        tiles.append(
            _attend_tile(q[..., start:stop, :], k[:, :, first:stop], v[:, :, first:stop], seen, softcap)
        )
    out = jnp.concatenate(tiles, axis=3) if len(tiles) > 1 else tiles[0]  # [s, g, r, t, e]
    return out.transpose(0, 3, 1, 2, 4).reshape(s, t, heads, v.shape[-1])


def _visible(start: int, stop: int, first: int, window: int | None) -> Bool[Array, "q k"]:
    """Which of the keys [first, stop) the queries [start, stop) attend to."""
    behind = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


def _attend_tile(q: Array, k: Array, v: Array, seen: Array, softcap: float) -> Array:
    """q [s, g, r, q, d], k and v [s, g, k, d] → [s, g, r, q, e]."""
    s, g, r, n, d = q.shape
    scores = _matmul(q.reshape(s, g, r * n, d), k.swapaxes(-1, -2)).reshape(s, g, r, n, -1)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[None, None, None], scores, -math.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _matmul(weights.reshape(s, g, r * n, -1).astype(v.dtype), v).reshape(s, g, r, n, -1)
    return out / total


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, **_EXACT)


def tiles_of_experts(
    chosen: Int[Array, "tokens used"], experts: int
) -> tuple[Int[Array, " tiles"], Int[Array, "tiles tile"], Int[Array, "tokens used"]]:
    """Sort (token, expert) pairs into tiles of one expert each, in the order of tokens.

    Returns the expert of each tile, the token of each row of each tile (−1: none), and the row in which each
    pair lies. However the tokens fall, pairs/TILE + experts tiles are enough: each expert wastes one at most.
    """
    tokens, used = chosen.shape
    tiles = tokens * used // TILE + experts
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    count = jnp.zeros(experts, jnp.int32).at[flat].add(1)
    tiles_before = jnp.cumsum(-(-count // TILE)) - (-(-count // TILE))  # of each expert
    pairs_before = jnp.cumsum(count) - count
    of_pair = flat[order]
    row = tiles_before[of_pair] * TILE + jnp.arange(tokens * used, dtype=jnp.int32) - pairs_before[of_pair]
    token = jnp.full(tiles * TILE, -1, jnp.int32).at[row].set((order // used).astype(jnp.int32))
    ends = jnp.cumsum(-(-count // TILE))
    expert = jnp.searchsorted(ends, jnp.arange(tiles, dtype=ends.dtype), side="right")
    slot = jnp.zeros(tokens * used, jnp.int32).at[order].set(row)
    expert = jnp.minimum(expert, experts - 1).astype(jnp.int32)
    return expert, token.reshape(tiles, TILE), slot.reshape(tokens, used)
