"""4-bit weights as GPTQ and AWQ store them: [in, out] instead of [out, in], eight codes in an int32.

    qweight  GPTQ int32 [in / 8, out]: input 8k + i of an output in bits 4i of word k
             AWQ  int32 [in, out / 8]: output 8k + ORDER[i] of an input in bits 4i of word k
    qzeros   int32 [groups, out / 8]: zeros, packed as AWQ packs codes; in GPTQ in plain order, each less 1
    scales   float16 [groups, out]
    g_idx    GPTQ int32 [in]: the group of each input

w = s (q − z) for q and z in [0, 15]. Source: AutoGPTQ, qlinear_cuda.py, QuantLinear.pack; AutoAWQ,
linear/gemm.py, WQLinear_GEMM.from_linear.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, Shaped, UInt8

from jquant.checkpoints.compressed_tensors import DTYPES
from jquant.core import QuantizedTensor, ScaledFormat, Source, TensorSpec, UserError

CODES = 8  # in a word
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLAIN = tuple(range(CODES))


class Layout(NamedTuple):
    method: Literal["gptq", "awq"]
    group_size: int | None  # None: the whole column
    zeros_less: int  # what is taken from zeros before they are packed


def specs_of(layout: Layout, spec: TensorSpec) -> list[TensorSpec]:
    """The tensors that stand for a weight [out, in].

    Raises UserError where the outputs are no whole words.
    """
    out, inputs = spec.shape
    if out % CODES:
        raise UserError(
            f"{spec.name}: {layout.method.upper()} needs a multiple of {CODES} outputs; got {out}. "
            "Leave it out with keep=…, or choose W4A16."
        )
    module, groups = spec.name.removesuffix(".weight"), inputs // (layout.group_size or inputs)
    rows = (inputs // CODES, out) if layout.method == "gptq" else (inputs, out // CODES)
    made = [
        TensorSpec(f"{module}.qweight", rows, "I32"),
        TensorSpec(f"{module}.qzeros", (groups, out // CODES), "I32"),
        TensorSpec(f"{module}.scales", (groups, out), "F16"),
    ]
    return [*made, TensorSpec(f"{module}.g_idx", (inputs,), "I32")] if layout.method == "gptq" else made


def stored(layout: Layout, q: QuantizedTensor) -> dict[str, np.ndarray]:
    """The arrays of these tensors, by the last part of their names. q: a weight in INT4 or UINT4."""
    format = q.format
    assert isinstance(format, ScaledFormat), f"{format}: has no codes and scales of its own"
    codes = np.asarray(format.unpack(jnp.asarray(q.parts[format.part]))).astype(np.int32).T  # [in, out]
    scales = np.asarray(q.parts["weight_scale"]).T
    if format.zeros:
        zeros = np.asarray(q.parts["weight_zero_point"]).astype(np.int32).T
    else:
        codes, zeros = codes + 8, np.full(scales.shape, 8, np.int32)
    gptq = layout.method == "gptq"
    order = PLAIN if gptq else ORDER
    made = {
        "qweight": _packed(codes.T, PLAIN).T if gptq else _packed(codes, ORDER),
        "qzeros": _packed(zeros - layout.zeros_less, order),
        "scales": scales.astype(np.float16),
    }
    if layout.method == "gptq":
        made["g_idx"] = np.arange(len(codes), dtype=np.int32) // (len(codes) // len(scales))
    return made


def _packed(codes: Int32[np.ndarray, "n out"], order: tuple[int, ...]) -> Int32[np.ndarray, "n out/8"]:
    words = np.zeros((len(codes), codes.shape[1] // CODES), np.uint32)
    for i, at in enumerate(order):
        words |= (codes[:, at::CODES] & 15).astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def _unpacked(words: Int32[np.ndarray, "n words"], order: tuple[int, ...]) -> Int32[np.ndarray, "n out"]:
    codes = np.empty((*words.shape, CODES), np.int32)
    for i, at in enumerate(order):
        codes[..., at] = words >> (4 * i) & 15
    return codes.reshape(len(words), -1)


class Transposed:
    """`source` with X.weight, float32 [out, in], in place of X.qweight, X.qzeros, X.scales and X.g_idx."""

    def __init__(self, source: Source, layout: Layout) -> None:
        """Raises UserError where the tensors of a weight are not all there, or do not fit."""
        self._source, self._layout = source, layout
        self._specs: dict[str, TensorSpec] = {}
        self._decoded: set[str] = set()
        self._last: tuple[str, np.ndarray] = ("", np.empty(0))
        packed = {name.removesuffix(".qweight") for name in source.specs if name.endswith(".qweight")}
        for name, spec in source.specs.items():
            module, _, part = name.rpartition(".")
            if module not in packed:
                self._specs[name] = spec
            elif part == "qweight":
                weight = self._weight(module, spec)
                self._specs[weight.name] = weight
                self._decoded.add(weight.name)
            elif part not in ("qzeros", "scales", "g_idx"):
                self._specs[name] = spec

    def _weight(self, module: str, words: TensorSpec) -> TensorSpec:
        rows, cols = words.shape
        gptq = self._layout.method == "gptq"
        shape = (cols, rows * CODES) if gptq else (cols * CODES, rows)
        weight = TensorSpec(f"{module}.weight", shape, "F32")
        for wanted in specs_of(self._layout, weight):
            found = self._source.specs.get(wanted.name)
            types = ("F16", "BF16", "F32") if wanted.type == "F16" else (wanted.type,)
            if found is None or found.shape != wanted.shape or found.type not in types:
                is_there = "is missing" if found is None else f"is {found.type} {found.shape}"
                raise UserError(
                    f"{wanted.name}: {is_there}; config.json and {words.name} {words.shape} ask for "
                    f"{wanted.type} {wanted.shape}. The folder is damaged."
                )
        return weight

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return MappingProxyType(self._specs)

    @property
    def decoded(self) -> Collection[str]:
        """Names of the weights that are stored as codes."""
        return self._decoded

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "k b"]:
        if name not in self._decoded:
            return self._source.read(name, start, stop)
        stop = self._specs[name].rows if stop is None else stop
        return np.ascontiguousarray(self._rows(name.removesuffix(".weight"), start, stop)).view(np.uint8)

    def _rows(self, module: str, start: int, stop: int) -> Float32[np.ndarray, "k in"]:
        words = self._words(f"{module}.qweight")
        gptq, whole = self._layout.method == "gptq", slice(start // CODES, -(-stop // CODES))
        order = PLAIN if gptq else ORDER
        own = slice(start - whole.start * CODES, stop - whole.start * CODES)  # of those in whole words
        if gptq:
            codes = _unpacked(words[:, start:stop].T, PLAIN)  # [k, in]
        else:
            codes = _unpacked(words[:, whole], ORDER)[:, own].T
        zeros = _unpacked(self._array(f"{module}.qzeros")[:, whole], order)[:, own].T  # [k, groups]
        zeros = zeros + self._layout.zeros_less
        scales = self._array(f"{module}.scales")[:, start:stop].T.astype(np.float32)
        if gptq:
            group = self._array(f"{module}.g_idx")[0]
            if not 0 <= group.min() <= group.max() < scales.shape[1]:
                raise UserError(
                    f"{module}.g_idx: names groups beyond {scales.shape[1]}; the folder is damaged."
                )
        else:
            group = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
        return (codes - zeros[:, group]).astype(np.float32) * scales[:, group]

    def _words(self, name: str) -> Int32[np.ndarray, "rows words"]:
        """Rows of the weight are columns here, so all of a tensor is read: once for all its slabs."""
        last = self._last
        if last[0] != name:
            last = self._last = (name, self._array(name))
        return last[1]

    def _array(self, name: str) -> Shaped[np.ndarray, "rows cols"]:
        return self._source.read(name).view(DTYPES[self._source.specs[name].type])
