"""Format, ScaledFormat, QuantizedTensor: how weights are written, and weights written so.

Axes. Inside a Format the **block index is the last axis**: weights run down, blocks run across. Every
device vectorises along its last axis, and no step of a search mixes two blocks, so this layout needs no
shuffles anywhere. `quantize` and `dequantize` do the transposing; a Format never sees a row or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
from jax import Array
from jaxtyping import PyTree


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a block of consecutive weights of one row is written in bytes. Hashable: a static jit argument.

    The encoder is split so that error feedback and refits can wrap any format without knowing it:
    `encode = pack ∘ assign ∘ fit`, `decode = reconstruct ∘ unpack`. With B = block_size and n blocks:

        fit(blocks [B, n], importance [B, n] | None) -> scales        the search for the scales
        assign(blocks, importance, scales) -> codes                   the best codes for given scales
        reconstruct(codes, scales) -> blocks [B, n] float32           what a runtime computes
        pack(codes, scales) -> uint8 [block_bytes, n]                 the bytes of the file
        unpack(uint8 [block_bytes, n]) -> (codes, scales)

    scales and codes are arrays, or tuples of arrays, whose last axis is n. Codes are integers, and
    codes[g] belongs to the weights [g · group_size, (g + 1) · group_size) where codes have one entry per
    group. Of a part of a block, whole groups [k · group_size, n] and of each scale that is [runs, n] the runs
    they lie in, `assign` and `reconstruct` give the part of what they give of the whole.
    `importance` weighs the squared error, Σ w (x − x̂)²; None means that no importance is known.
    A format without `fit` can be read but not yet written.
    """

    name: str  # ggml's name: "Q4_K"
    ggml_type: int | None  # None: not a GGUF type
    block_size: int  # weights per block
    block_bytes: int
    group_size: int = 1  # consecutive weights that share one code
    fit: Callable[..., PyTree] | None = field(default=None, repr=False)
    assign: Callable[..., PyTree] | None = field(default=None, repr=False)
    reconstruct: Callable[..., Array] = field(repr=False)
    pack: Callable[..., Array] = field(repr=False)
    unpack: Callable[..., tuple[PyTree, PyTree]] = field(repr=False)
    needs_importance: bool = False  # useless without: llama.cpp refuses it, and so do we

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_size

    @property
    def can_encode(self) -> bool:
        return self.fit is not None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class ScaledFormat:
    """How rows are written as codes and scales, tensors of their own, as safetensors have them. Hashable.

    A scale is shared by the `group_size` weights of a group, or by a whole row; where the format has `zeros`,
    scales are pairs of arrays, w ≈ s (q − z). Of n groups of g weights:

        fit(groups [n, g], importance [n, g] | None) -> scales [n]     the search; what is stored is rounded
        assign(groups [n, g], scales [n]) -> codes [n, g]              the nearest codes
        reconstruct(codes [n, g], scales [n]) -> groups [n, g]         what a runtime computes
        pack(codes [*rows, cols]) -> the stored tensor                 parts[part]
        unpack(stored) -> codes [*rows, cols]
    """

    name: str
    bits: int
    group_size: int | None = None  # None: the whole row
    part: str = "weight"  # what the codes are called behind the name of the module
    type: str  # stored type of the codes, as safetensors call it
    per_code: int = 1  # codes in one stored number
    scale_type: Literal["F32", "F16", "BF16"] = "F32"
    zeros: bool = False
    fit: Callable[..., PyTree] = field(repr=False)
    assign: Callable[..., Array] = field(repr=False)
    reconstruct: Callable[..., Array] = field(repr=False)
    pack: Callable[[Array], Array] = field(repr=False)
    unpack: Callable[[Array], Array] = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def groups(self, cols: int) -> int:
        """Scales of a row."""
        return 1 if self.group_size is None else cols // self.group_size

    @property
    def scale_parts(self) -> tuple[str, ...]:
        """What the arrays of the scales are called."""
        return ("weight_scale", "weight_zero_point") if self.zeros else ("weight_scale",)


@partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=("format",))
@dataclass(frozen=True)
class QuantizedTensor:
    """Bytes of a tensor in a Format, or its codes and scales: a pytree whose only static part is the format.

    Of a Format parts["blocks"] is uint8 [*rows, blocks per row · block_bytes]: what GGUF stores. Of a
    ScaledFormat parts[format.part] are the codes, [*rows, cols] where not packed, and parts["weight_scale"]
    the scales, [*rows, groups]; "weight_zero_point" their zeros, likewise. The shape is derived from the
    leaves, so it stays right under `vmap` and when a leading axis is sliced or stacked.
    """

    parts: dict[str, Any]  # arrays; while JAX transforms the tree, its placeholders
    format: Format | ScaledFormat

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.format, ScaledFormat):
            *rows, stored = self.parts[self.format.part].shape
            return (*rows, stored * self.format.per_code)
        *rows, row_bytes = self.parts["blocks"].shape
        return (*rows, row_bytes // self.format.block_bytes * self.format.block_size)

    @property
    def nbytes(self) -> int:
        return sum(part.size * part.dtype.itemsize for part in self.parts.values())
