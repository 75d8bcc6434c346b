"""The kind of block of all architectures here: attention, then an MLP or experts.

    h = x + post(Wo attention(rope(norm(Wq n)), rope(norm(Wk n)), Wv n)),   n = rmsnorm(x)
    y = h + post(down(act(gate m) · up m)),                                 m = rmsnorm(h)

What a file has no tensor for is left out: biases, the norms of q and k, the norms after a sublayer, experts.
q, k and v may lie in one matrix, and gate and up in another.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jquant.models._header import Header, Traits
from jquant.models._kinds import MIXER_IN, MIXER_OUT, Coupling, Kind, Matrix, coupling
from jquant.models._layers import Block, attend
from jquant.models._mlp import MLP, MLP_NORMS, mlp_couplings
from jquant.models._rope import Rotary


class AttentionBlock(Block, kw_only=True):
    """One block of a decoder."""

    heads: int
    kv_heads: int
    head_dim: int  # of q and k
    value_dim: int
    attention_scale: float
    rotary_dims: int
    rotary_pairs: bool  # neighbours are turned together; else row i of a head with row i + dims/2
    rotary_magnitude: float = 1.0
    window: int | None = None  # tokens that a token attends to, itself among them
    attention_softcap: float = 0.0  # scores → cap · tanh(scores / cap)

    @nn.compact
    def __call__(
        self, x: Float[Array, "s t width"], angles: Float[Array, "t pairs"]
    ) -> Float[Array, "s t width"]:
        """angles: what each pair of each head is turned by at each position, radians."""
        attended = self._attention(self._factor(self._norm("attn_norm", x)), angles)
        attended = self._linear("attn_output")(self._factor(attended))
        h = x + self._norm_if_any("post_attention_norm", attended)
        return self._fed_forward(h)

    def _attention(self, n: Array, angles: Array) -> Array:
        s, t, _ = n.shape
        if self._has("attn_qkv"):
            rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
            q, k, v = jnp.split(self._linear("attn_qkv")(n), (rows[0], rows[0] + rows[1]), axis=-1)
        else:
            q, k, v = (self._linear(f"attn_{name}")(n) for name in "qkv")
        q = self._norm_if_any("attn_q_norm", q.reshape(s, t, self.heads, self.head_dim))
        k = self._norm_if_any("attn_k_norm", k.reshape(s, t, self.kv_heads, self.head_dim))
        v = v.reshape(s, t, self.kv_heads, self.value_dim)
        q, k = (self._turn(y, angles) for y in (q, k))
        q, k, v = (self._factor(y) for y in (q * self.attention_scale, k, v))
        out = attend(q, k, v, window=self.window, softcap=self.attention_softcap)
        return out.reshape(s, t, self.heads * self.value_dim)

    def _turn(self, y: Array, angles: Array) -> Array:
        """y [s, t, heads, head_dim] with each pair (a, b) turned by its angle."""
        shape = (1, y.shape[1], 1, self.rotary_dims // 2)
        cos, sin = (f(angles).reshape(shape) * self.rotary_magnitude for f in (jnp.cos, jnp.sin))
        turned, rest = jnp.split(y, (self.rotary_dims,), axis=-1)
        if self.rotary_pairs:
            a, b = turned[..., 0::2], turned[..., 1::2]
            pair = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)  # [s, t, heads, pair, 2]
            turned = pair.reshape(turned.shape)
        else:
            a, b = jnp.split(turned, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        return jnp.concatenate([turned, rest], axis=-1)


def _block(
    header: Header, traits: Traits, i: int, count: int, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> tuple[Block, Rotary]:
    width, heads = header.integer("embedding_length"), header.integer("attention.head_count", at=i)
    head_dim = header.integer("attention.key_length", width // heads)
    windowed, window = _window(header, traits, i)
    dims = header.integer("rope.dimension_count", head_dim)
    scaling = header.text("rope.scaling.type", "linear")
    factor = header.number("rope.scaling.factor", header.number("rope.scale_linear", 1.0)) or 1.0
    rotary = Rotary(
        dims=dims,
        base=header.number("rope.freq_base", 10000.0),
        factor=1.0 if scaling == "none" else factor,
        yarn=scaling == "yarn",
        original_context=header.integer(
            "rope.scaling.original_context_length", header.integer("context_length", 0)
        ),
        attention_factor=header.number("rope.scaling.attn_factor", 1.0),
    )
    if windowed and traits.window_rotary_base is not None:
        base = header.number("rope.freq_base_swa", traits.window_rotary_base)
        rotary = Rotary(dims=dims, base=base)
    by_width = traits.blocks_scaled_by_width == count
    block = AttentionBlock(
        shapes=shapes,
        heads=heads,
        kv_heads=header.integer("attention.head_count_kv", heads, at=i),
        head_dim=head_dim,
        value_dim=header.integer("attention.value_length", width // heads),
        eps=header.number("attention.layer_norm_rms_epsilon"),
        attention_scale=1 / math.sqrt(width // heads if by_width else head_dim),
        rotary_dims=dims,
        rotary_pairs=traits.rotary_pairs,
        rotary_magnitude=rotary.magnitude,
        window=window if windowed else None,
        attention_softcap=header.number("attn_logit_softcapping", traits.attention_softcap),
        gelu=traits.gelu,
        experts_used=header.integer("expert_used_count", 0),
        experts_normalized=traits.experts_normalized,
    )
    return block, rotary


def _window(header: Header, traits: Traits, i: int) -> tuple[bool, int]:
    """Whether block i sees a window only, and how many tokens it has."""
    window = header.integer("attention.sliding_window", traits.window or 0)
    if not window:
        return False, 0
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray | list):
        return bool(pattern[i]), window
    period = header.integer("attention.sliding_window_pattern", traits.window_period)
    return period == 0 or i % period < period - 1, window


def _couplings(block: Block) -> tuple[Coupling, ...]:
    """norm → q, k, v; v → output; and those of the MLP.

    Attention mixes tokens, not channels: a channel of v is one of the output's inputs for each head that
    shares it.
    """
    assert isinstance(block, AttentionBlock)
    shapes = {name.removesuffix(".weight"): shape for name, shape in block.shapes if name.endswith(".weight")}
    is_fused = "attn_qkv" in shapes
    value = (block.heads + block.kv_heads) * block.head_dim if is_fused else 0  # the first row of v
    heads = (block.kv_heads, block.heads // block.kv_heads)
    queries = ("attn_q", "attn_k", "attn_v", "attn_qkv")
    producer = "attn_qkv" if is_fused else "attn_v"
    return (
        *coupling(shapes, "attn_norm", "attn_norm", queries, before_mixing=True),
        *coupling(shapes, "attn_v", producer, ("attn_output",), start=value, heads=heads),
        *mlp_couplings(shapes),
    )


def _attention(name: str, sensitivity: float, together: str | None = None) -> Matrix:
    return Matrix(
        name=name,
        stage=MIXER_IN,
        role="attention",
        over_model="rows",
        sensitivity=sensitivity,
        searched_with=together,
    )


ATTENTION_BLOCK = Kind(
    "attention",
    matrices=(
        _attention("attn_q", 0.9, "attn_q and attn_k"),
        _attention("attn_k", 1.8, "attn_q and attn_k"),
        _attention("attn_v", 1.8),
        Matrix(name="attn_qkv", stage=MIXER_IN, role="attention", sensitivity=4.5),  # no equal parts to split
        Matrix(name="attn_output", stage=MIXER_OUT, role="attention", over_model="columns", sensitivity=1.5),
        *MLP,
    ),
    norms=("attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", *MLP_NORMS),
    block=_block,
    couplings=_couplings,
)
