"""A decoder as GGUF describes it: hyperparameters from the header, weights by tensor name, block by block."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int

from jquant.core import Metadata, TensorSpec, UserError, block_parameters, output_name
from jquant.models._header import Header, Traits
from jquant.models._kinds import kind_of, matrix, unknown_of
from jquant.models._layers import PRECISION, Block, Precision, Rounding, rms_norm
from jquant.models._rope import Rotary, angles

SLAB_WEIGHTS = 1 << 24  # weights of an embedding that are decoded at once

Parameters = dict[str, dict[str, Array]]


@runtime_checkable
class Tensors(Protocol):
    """Where weights come from: float32, whatever the file stores."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...

    def tensor(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Decoder:
    """A model to compute with. Nothing but the headers and the vectors of rotary embedding is in memory."""

    tensors: Tensors
    blocks: tuple[Block, ...]
    rotary: tuple[Rotary, ...]  # of each block
    width: int
    vocab: int
    eps: float
    embedding_scale: float
    final_softcap: float
    input_scales: Mapping[str, np.ndarray] = field(default_factory=dict, hash=False)

    def rounded(
        self, rounding: Rounding, names: Collection[str], scales: Mapping[str, np.ndarray] | None = None
    ) -> Decoder:
        """The decoder whose matrices of these GGUF names are given what `rounding` makes of their inputs.

        scales: that it is given too, by name; float32 [], of a stack [experts].
        """
        blocks = []
        for i, block in enumerate(self.blocks):
            here = {n.split(".")[2] for n in names if n.startswith(f"blk.{i}.")}
            blocks.append(block.clone(rounding=rounding, rounded=frozenset(here)))
        return replace(self, blocks=tuple(blocks), input_scales=scales or {})

    def at(self, precision: Precision) -> Decoder:
        """The decoder whose blocks multiply factors of this precision, and hold their matrices in it."""
        return replace(self, blocks=tuple(block.clone(precision=precision) for block in self.blocks))

    def embed(self, tokens: Int[np.ndarray, "s t"]) -> Float32[np.ndarray, "s t width"]:
        """The input of the first block. The embedding is decoded a slab of rows at a time."""
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab:
            bad = int(tokens.max() if tokens.max() >= self.vocab else tokens.min())
            raise UserError(f"token {bad} is not in the model's vocabulary of {self.vocab}.")
        out = np.empty((*tokens.shape, self.width), np.float32)
        for start, stop in self._slabs("token_embd.weight"):
            here = (tokens >= start) & (tokens < stop)
            if here.any():
                rows = self.tensors.rows("token_embd.weight", start, stop)
                out[here] = rows[tokens[here] - start] * np.float32(self.embedding_scale)
        return out

    def load_block(self, i: int) -> Parameters:
        """The parameters of block i on the device: {"attn_q": {"weight": [out, in]}, …}, float32, or matrices
        as the block multiplies them; "input_scale" beside the weight where the inputs have one."""

        def value(name: str, shape: tuple[int, ...]) -> Array:
            stored = jnp.asarray(self.tensors.tensor(f"blk.{i}.{name}").reshape(shape))
            return stored.astype(self.blocks[i].precision) if len(shape) > 1 else stored

        params = block_parameters(self.blocks[i].shapes, value)
        for module, values in params.items():
            scale = self.input_scales.get(f"blk.{i}.{module}.weight")
            if scale is not None:
                values["input_scale"] = jnp.asarray(scale)
        return params

    def angles(self, i: int, tokens: int) -> Float32[np.ndarray, "t pairs"]:
        """What block i turns its heads by at positions 0, 1, …: radians."""
        rotary = self.rotary[i]
        name = "rope_freqs.weight"
        if name not in self.tensors.specs:
            kind = "long" if tokens > rotary.original_context else "short"
            name = f"rope_factors_{kind}.weight"
        divisors = self.tensors.tensor(name) if name in self.tensors.specs else None
        return angles(rotary.frequencies(divisors), np.arange(tokens))

    def logits(self, x: Float[Array, "s t width"]) -> Float[Array, "s t vocab"]:
        """What the output of the last block predicts of the next token."""
        rows = (self.output_rows(*slab) for slab in self.output_slabs())
        return jnp.concatenate([self.project(jnp.asarray(part), x) for part in rows], axis=-1)

    @property
    def output_name(self) -> str:
        return output_name(self.tensors.specs)

    @property
    def tied(self) -> bool:
        """Whether the rows of the output matrix are the token embeddings too."""
        return self.output_name == "token_embd.weight"

    def output_slabs(self) -> list[tuple[int, int]]:
        """Ranges of rows of the output matrix that are decoded at once."""
        return self._slabs(self.output_name)

    def output_rows(self, start: int, stop: int) -> Float32[np.ndarray, "n width"]:
        return self.tensors.rows(self.output_name, start, stop)

    def output_inputs(self, x: Float[Array, "s t width"]) -> Float[Array, "s t width"]:
        """What the output matrix is given of the last block's output."""
        return _normed(x, jnp.asarray(self.tensors.tensor("output_norm.weight")), self.eps)

    def project(
        self,
        rows: Float[Array, "n width"],
        x: Float[Array, "s t width"],
        norm: Float[Array, " width"] | None = None,
    ) -> Float[Array, "s t n"]:
        """The part of the logits that these rows of the output matrix make; norm: in place of the model's."""
        if norm is None:
            norm = jnp.asarray(self.tensors.tensor("output_norm.weight"))
        return _project(norm, rows, x, self.eps, self.final_softcap)

    def _slabs(self, name: str) -> list[tuple[int, int]]:
        spec = self.tensors.specs[name]
        step = max(SLAB_WEIGHTS // spec.cols, 1)
        return [(start, min(start + step, spec.rows)) for start in range(0, spec.rows, step)]


_normed = jax.jit(rms_norm, static_argnames="eps")


@partial(jax.jit, static_argnames=("eps", "softcap"))
def _project(norm: Array, output: Array, x: Array, eps: float, softcap: float) -> Array:
    logits = jnp.matmul(rms_norm(x, norm, eps), output.T, precision=PRECISION)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def matrices(params: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """The weights of a block's matrices and stacks, or what has their places; those of norms are none, nor is
    what the table of its kind calls no linear layer."""
    return {
        name: of["weight"]
        for name, of in params.items()
        if "weight" in of
        and of["weight"].ndim > 1
        and "norm" not in name
        and ((row := matrix(name)) is None or row.form != "other")
    }


def open_decoder(tensors: Tensors, metadata: Metadata, traits: Mapping[str, Traits]) -> Decoder:
    """Read a model's hyperparameters; traits: of each architecture, by GGUF's name.

    Raises UserError for an architecture that is not among them, a header that lacks something, or a tensor
    that no part of the block would use.
    """
    header = Header(metadata)
    if header.architecture not in traits:
        raise UserError(
            f"architecture {header.architecture!r}: its forward pass is not known; known: "
            f"{', '.join(sorted(traits))}. Give an importance matrix that llama-imatrix made instead."
        )
    own = traits[header.architecture]
    count = header.integer("block_count")
    kinds = [_block(header, own, i, count, _shapes(tensors.specs, i)) for i in range(count)]
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in tensors.specs:
            raise UserError(f"the model has no tensor {name}; the file is incomplete.")
    width = header.integer("embedding_length")
    return Decoder(
        tensors,
        tuple(block for block, _ in kinds),
        tuple(rotary for _, rotary in kinds),
        width,
        tensors.specs["token_embd.weight"].rows,
        header.number("attention.layer_norm_rms_epsilon"),
        math.sqrt(width) if own.embedding_scaled else 1.0,
        header.number("final_logit_softcapping", own.final_softcap),
    )


def _shapes(specs: Mapping[str, TensorSpec], i: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Tensors of block i, without "blk.i.", sorted."""
    prefix = f"blk.{i}."
    found = sorted((n.removeprefix(prefix), s.shape) for n, s in specs.items() if n.startswith(prefix))
    if not found:
        raise UserError(f"the header says that there is a block {i}, but it has no tensors.")
    return tuple(found)


def _block(
    header: Header, traits: Traits, i: int, count: int, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> tuple[Block, Rotary]:
    """Block i, of the kind that knows its tensors."""
    kind = kind_of(shapes)
    if kind is None:
        raise UserError(
            f"blk.{i}.{unknown_of(shapes)}: what the model does with this tensor is not known; calibrating "
            "without it would measure another model."
        )
    return kind.block(header, traits, i, count, shapes)
