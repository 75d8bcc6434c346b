"""The nouns that all else is built from: Format, ScaledFormat, QuantizedTensor, TensorSpec, Source, Sink,
BlockwiseModel.

Axes. Inside a Format the **block index is the last axis**: weights run down, blocks run across. Every
device vectorises along its last axis, and no step of a search mixes two blocks, so this layout needs no
shuffles anywhere. `quantize` and `dequantize` do the transposing; a Format never sees a row or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, PyTree, UInt8


class Grain(NamedTuple):
    """How many weights a device searches at once."""

    tile: int  # weights that go through the whole search before the next do
    chunk: int  # weights of one step of a compiled loop: its fixed shape means one compilation per format


# A CPU's tile is small enough that a block's whole search stays in a core's cache, large enough that the
# vector units are full. An accelerator has a hundred thousand lanes to fill; with twice as many weights the
# tables of a search leave an H200's cache, and IQ3_S takes three times as long.
CPU_GRAIN = Grain(1 << 14, 1 << 15)
ACCELERATOR_GRAIN = Grain(1 << 21, 1 << 21)


def grain() -> Grain:
    """That of the devices in use."""
    return CPU_GRAIN if jax.default_backend() == "cpu" else ACCELERATOR_GRAIN


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what, where, what was found, what to do."""


class OutputError(UserError):
    """The output cannot be written: it exists, its folder is missing or read-only, the disk is full."""


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


SCALE_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


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


_T = TypeVar("_T")

# How long to search: "fast" is each format's own search, "best" the best of several that start differently.
Effort = Literal["fast", "best"]


@cache
def at_effort(format: Format, effort: Effort) -> Format:
    """The format with the search of this effort, for `encode_chunk`.

    "best" takes some five times as long and keeps, block by block, what has the least error.
    """
    if effort == "fast" or format.fit is None or format.block_size == 1:
        return format
    return replace(format, fit=partial(_best_of_starts, format))


def _best_of_starts(
    format: Format, blocks: Float[Array, "B n"], importance: Float[Array, "B n"] | None
) -> PyTree:
    """Scales of least weighted error, of the searches for four importances.

    The importance given is one. In the others large weights count more, or less, or all weights are more
    alike: each leads the search to other scales, and what it finds is judged by the importance given.
    """
    fit, assign = format.fit, format.assign
    assert fit is not None
    assert assign is not None
    w = jnp.ones_like(blocks) if importance is None else importance
    heaviest = jnp.max(w, axis=0)
    w = w / jnp.where(heaviest > 0, heaviest, 1)[None]  # so that no sum leaves float32's range
    largest = jnp.max(jnp.abs(blocks), axis=0)
    x = blocks / jnp.where(largest > 0, largest, 1)[None]
    steep = jnp.sqrt(jnp.mean(x * x, axis=0)[None] + x * x) + 1e-6
    starts = jnp.stack([w, w * steep, w / steep, jnp.sqrt(w * jnp.mean(w, axis=0)[None])])

    def error(scales: PyTree) -> Array:
        decoded = format.reconstruct(assign(blocks, importance, scales), scales)
        rest = (blocks - decoded) / jnp.where(largest > 0, largest, 1)[None]
        found = jnp.sum(w * rest * rest, axis=0)
        return jnp.where(jnp.isnan(found), jnp.inf, found)

    def step(best: tuple[Array, PyTree], start: Array) -> tuple[tuple[Array, PyTree], None]:
        scales = lax.optimization_barrier(fit(blocks, start))
        found = error(scales)
        better = found < best[0]
        kept = jax.tree.map(lambda a, b: jnp.where(jnp.broadcast_to(better, a.shape), a, b), scales, best[1])
        return (jnp.minimum(found, best[0]), kept), None

    if importance is None:  # the search without importance is one of its own
        scales = fit(blocks, None)
        best = error(scales), scales
    else:
        zero = jnp.where(largest == largest, 0.0, 0.0)  # varies over devices as the blocks do
        shapes = jax.eval_shape(fit, blocks, importance)
        best = zero + jnp.inf, jax.tree.map(lambda a: jnp.broadcast_to(zero.astype(a.dtype), a.shape), shapes)
    return lax.scan(step, best, starts)[0][1]


def encode_chunk(
    format: Format,
    blocks: Float[Array, "n B"],
    importance: Float[Array, "n B"] | None = None,
    tile: int | None = None,
) -> UInt8[Array, "n bytes"]:
    """One step of the loop: a few blocks to bytes, in the layout of a file (one block a row).

    tile: of a device's `Grain`; default: of the devices in use.
    """
    fit, assign = format.fit, format.assign
    assert fit is not None
    assert assign is not None
    # The barrier keeps the caller's arithmetic out of the search: fused with it, x·a − b would become one
    # rounded operation instead of two, and bytes would depend on who calls.
    blocks, importance = lax.optimization_barrier((blocks, importance))
    n, B = blocks.shape
    tiles = n * B // (tile or grain().tile)
    if B == 1 or tiles == 0 or n % tiles:  # single weights need no transposition
        tiles = 1

    def tiled(a: Array) -> Array:
        # What a loop runs over lies in memory: the blocks are transposed once, not in every pass over them.
        return a.reshape(tiles, n // tiles, B).transpose(0, 2, 1)

    def encode(tile: tuple[Array, Array | None]) -> Array:
        # Without this barrier the arithmetic of the scales would be repeated for every weight of their group.
        scales = lax.optimization_barrier(fit(*tile))
        return format.pack(assign(*tile, scales), scales)

    data = lax.map(encode, (tiled(blocks), None if importance is None else tiled(importance)))
    return data.transpose(0, 2, 1).reshape(n, format.block_bytes)  # [tile, bytes, block] before


def decode_chunk(format: Format, data: UInt8[Array, "n bytes"]) -> Float[Array, "n B"]:
    """The inverse step: a few blocks of bytes to float32 weights."""
    return format.reconstruct(*format.unpack(lax.optimization_barrier(data).T)).T


def chunk_blocks(format: Format, blocks: int | None = None) -> int:
    """Blocks in one step of the loop; blocks: how many there are, so that a few do not make a large step."""
    least, most = (max(weights // format.block_size, 1) for weights in (CPU_GRAIN.chunk, grain().chunk))
    return most if blocks is None else max(min(most, -(-blocks // least) * least), 1)


def _over_chunks(step: Callable[..., Array], format: Format, *arrays: Array) -> Array:
    """step over [n, …] arrays, a chunk of rows at a time; the last step is padded with zeros."""
    n = arrays[0].shape[0]
    chunk = chunk_blocks(format, n)
    steps = -(-n // chunk)

    def split(a: Array) -> Array:
        return jnp.pad(a, ((0, steps * chunk - n), (0, 0))).reshape(steps, chunk, a.shape[1])

    out = lax.map(lambda args: step(*args), tuple(map(split, arrays)))  # [steps, chunk, out]
    return out.reshape(steps * chunk, out.shape[-1])[:n]


def _batched_by_rows(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` of arrays [n, …], whose `vmap` is the same function of more rows.

    Rows are independent, so a batch axis is only more of them. Without this, `vmap` would give the loop
    body another shape, another fusion, and now and then another last bit.
    """
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def rule(axis_size: int, in_batched: list[bool], *arrays: Array):
        def rows(a: Array, batched: bool) -> Array:
            a = a if batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            return a.reshape(axis_size * a.shape[1], *a.shape[2:])

        merged = [rows(a, batched) for a, batched in zip(arrays, in_batched, strict=True)]
        out = _batched_by_rows(function)(*merged)
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return wrapped


@partial(jax.jit, static_argnames="format")
def _encode(x: Array, importance: Array | None, format: Format) -> Array:
    *rows, cols = x.shape
    arrays = [x] if importance is None else [x, jnp.broadcast_to(importance, x.shape)]
    blocks = [a.astype(jnp.float32).reshape(-1, format.block_size) for a in arrays]
    step = partial(encode_chunk, format)
    data = _batched_by_rows(partial(_over_chunks, step, format))(*blocks)
    return data.reshape(*rows, cols // format.block_size * format.block_bytes)


@partial(jax.jit, static_argnames="format")
def _decode(data: Array, format: Format) -> Array:
    *rows, row_bytes = data.shape
    step = partial(decode_chunk, format)
    decode = _batched_by_rows(partial(_over_chunks, step, format))
    out = decode(data.reshape(-1, format.block_bytes))
    return out.reshape(*rows, row_bytes // format.block_bytes * format.block_size)


@partial(jax.jit, static_argnames="format")
def _encode_scaled(x: Array, importance: Array | None, format: ScaledFormat) -> dict[str, Array]:
    *rows, cols = x.shape
    groups = format.groups(cols)

    def grouped(a: Array) -> Array:
        return jnp.broadcast_to(a, x.shape).astype(jnp.float32).reshape(-1, cols // groups)

    found = format.fit(grouped(x), None if importance is None else grouped(importance))
    dtype = SCALE_DTYPES[format.scale_type]
    stored = lax.optimization_barrier(jax.tree.map(lambda a: a.astype(dtype), found))
    codes = format.assign(grouped(x), jax.tree.map(lambda a: a.astype(jnp.float32), stored))
    by_name = zip(format.scale_parts, jax.tree.leaves(stored), strict=True)
    scales = {name: a.reshape(*rows, groups) for name, a in by_name}
    return {format.part: format.pack(codes.reshape(x.shape)), **scales}


@partial(jax.jit, static_argnames="format")
def _decode_scaled(parts: dict[str, Array], format: ScaledFormat) -> Array:
    codes = format.unpack(parts[format.part])
    scales = tuple(parts[name].astype(jnp.float32).reshape(-1) for name in format.scale_parts)
    groups = codes.reshape(scales[0].size, -1)
    return format.reconstruct(groups, scales if format.zeros else scales[0]).reshape(codes.shape)


def quantize(
    x: Float[Array, "*rows cols"],
    format: Format | ScaledFormat,
    importance: Float[Array, "..."] | None = None,
    *,
    effort: Effort = "fast",
) -> QuantizedTensor:
    """Encode `x`, whose last axis is a whole number of blocks.

    importance: weight of each weight's squared error, of x's shape or broadcast to it; [cols] is the
    imatrix of the layer's inputs. effort: see `at_effort`; a ScaledFormat has one search. The bytes are the
    same eagerly and under `jit`, `vmap`, `lax.map` and `shard_map`.

    Raises ValueError where the format cannot be encoded or the shapes do not fit.
    """
    scaled = isinstance(format, ScaledFormat)
    if not scaled and not format.can_encode:
        raise ValueError(f"{format.name} can be decoded but not encoded; choose another format.")
    block = format.group_size or 1 if scaled else format.block_size
    if x.ndim == 0 or x.shape[-1] % block:
        raise ValueError(
            f"{format.name} needs rows of a multiple of {block} weights; got shape {x.shape}. "
            "Choose a format with a smaller block for this tensor, such as Q8_0, or F16."
        )
    if importance is None and not scaled and format.needs_importance:
        raise ValueError(f"{format.name} needs importance: pass the layer's imatrix, one value a column.")
    if importance is not None:
        try:
            fits = np.broadcast_shapes(importance.shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"importance of shape {importance.shape} does not fit {x.shape}; pass one value a column."
            )
    if scaled:
        return QuantizedTensor(_encode_scaled(x, importance, format), format)
    return QuantizedTensor({"blocks": _encode(x, importance, at_effort(format, effort))}, format)


def dequantize(q: QuantizedTensor) -> Float[Array, "*rows cols"]:
    """The float32 weights that a runtime sees, of GGUF's formats bit for bit what ggml computes."""
    if isinstance(q.format, ScaledFormat):
        return _decode_scaled(q.parts, q.format)
    return _decode(q.parts["blocks"], q.format)


# A typed value of a GGUF header. NumPy's types tell UINT32 from INT32 and FLOAT32 from FLOAT64, so a value
# that is read and written again keeps its type: np.uint32(32), np.float32(1e-5), an array of np.int32.
MetadataValue = str | bool | np.generic | np.ndarray | list[str]
Metadata = Mapping[str, MetadataValue]

# ggml's types: name → number in a GGUF header. gguf-py lags behind llama.cpp for the newest one.
GGML_TYPES = {t.name: t.value for t in gguf.GGMLQuantizationType} | {"Q2_0": 42}
# Weights and bytes of one block of each stored type.
_BLOCKS: dict[str, tuple[int, int]] = {t.name: size for t, size in gguf.GGML_QUANT_SIZES.items()}
_BLOCKS |= {"Q2_0": (64, 18)}
_ONLY_SAFETENSORS = {"BOOL": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8}
_ONLY_SAFETENSORS |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_BLOCKS |= {name: (1, size) for name, size in _ONLY_SAFETENSORS.items()}


def block_and_bytes(type: str) -> tuple[int, int]:
    """Weights and bytes of one block of a stored type, as the file formats define them."""
    if type not in _BLOCKS:
        raise UserError(f"unknown tensor type {type!r}; upgrade the gguf package if it is new.")
    return _BLOCKS[type]


def bits_per_weight(type: str) -> float:
    block, size = block_and_bytes(type)
    return 8 * size / block


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor. shape is in NumPy order: (rows…, columns); GGUF's is the reverse."""

    name: str
    shape: tuple[int, ...]
    type: str  # a key of FORMATS ("F16", "Q4_K", "F8_E4M3"), or a type that is only copied ("I32")

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix; a vector or a scalar has one."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def size(self) -> int:
        return self.rows * self.cols

    @property
    def row_bytes(self) -> int:
        block, size = block_and_bytes(self.type)
        return self.cols // block * size

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@runtime_checkable
class Source(Protocol):
    """A model to read: headers at once, rows when asked.

    `read` returns rows [start, stop) of the tensor seen as a matrix, as stored bytes, uint8
    [stop − start, row bytes]. It may be called from several threads.
    """

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...


@runtime_checkable
class Writer(Protocol):
    """Takes the tensors of a file whose layout is known from the start. `write` may be called from several
    threads."""

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Put rows (uint8 [k, row bytes]) of a tensor at row `start`."""
        ...

    def finish(self, name: str) -> None:
        """All rows of this tensor are written: remember it for a resumed run."""
        ...

    def finished(self) -> Iterable[str]:
        """Tensors that an interrupted run has already written."""
        ...


@runtime_checkable
class Sink(Writer, Protocol):
    """A file to write."""

    def commit(self) -> None:
        """Make the file appear under its final name."""
        ...

    def close(self) -> None:
        """Release the file without committing; what was written stays for a resumed run."""
        ...


@runtime_checkable
class Block(Protocol):
    """One block of a model: a Flax module that shows what each matrix is given in the collection "inputs":
    {"x": [s, t, width]}, or for a stack of experts {"x": [tiles, tile, width], "expert": [tiles], "token":
    [tiles, tile]}, where token counts from the first of all samples and −1 marks a row without one. What the
    collection "nudges" has under the same names, {"y": …}, is added to the outputs of these matrices."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the parameters: ("ffn_down.weight", (out, in))

    def apply(
        self, variables: Mapping, x: Array, angles: Array, *, mutable: str
    ) -> tuple[Array, Mapping]: ...


def block_parameters(
    shapes: Iterable[tuple[str, tuple[int, ...]]], value: Callable[[str, tuple[int, ...]], _T]
) -> dict[str, dict[str, _T]]:
    """What a block is applied to, {"attn_q": {"weight": …}}, of value(name, shape) for each of its `shapes`.
    A matrix of one row, which is stored as a vector, is a matrix again."""
    found: dict[str, dict[str, _T]] = {}
    for name, shape in shapes:
        module, _, kind = name.partition(".")
        row = kind == "weight" and "norm" not in module and len(shape) == 1
        found.setdefault(module, {})[kind] = value(name, (1, *shape) if row else shape)
    return found


@runtime_checkable
class BlockwiseModel(Protocol):
    """A model whose blocks are run one after the other, each loaded when it is its turn."""

    @property
    def blocks(self) -> Sequence[Block]: ...

    def embed(self, tokens: np.ndarray) -> np.ndarray: ...

    def load_block(self, i: int) -> dict[str, dict[str, Array]]: ...

    def angles(self, i: int, tokens: int) -> np.ndarray: ...

    def logits(self, x: Array) -> Array: ...
