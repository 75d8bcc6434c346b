"""Tensors that no file type quantizes: small, sensitive, or read by the runtime as floats.

Source: tensor_allows_quantization in llama-quant.cpp; which of them must be float32 in a file is settled by
llama.cpp's converter (conversion/base.py, prepare_tensors).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jquant.core import TensorSpec, block_and_bytes

# Stored as floats that any file type may replace; "F8_…" occurs in safetensors only.
_HALVES = {"F16", "BF16"}
_FLOAT8 = {"F8_E4M3", "F8_E5M2"}


class Kept(NamedTuple):
    """Why a tensor is not quantized, and the type that it has in the file."""

    reason: str
    type: str


class _Row(NamedTuple):
    pattern: re.Pattern[str]  # searched in the tensor name
    reason: str
    float32: bool  # halves are widened: the runtime reads float32 here


def _row(pattern: str, reason: str, *, float32: bool) -> _Row:
    return _Row(re.compile(pattern), reason, float32)


_ROWS = (
    _row(r"_norm\.weight", "norms stay F32", float32=True),
    _row(r"ffn_gate_inp\.weight", "the router stays F32", float32=True),
    _row(r"^(position_embd|token_types)\.weight$", "positions and token types are added, not multiplied",
         float32=True),
    _row(r"ssm_conv1d|shortconv\.conv\.weight", "short convolutions are small", float32=True),
    _row(r"time_mix_(first|w[12]|decay_w[12]|lerp_fused)\.weight", "RWKV's small matrices", float32=True),
    _row(r"time_mix_(w0|v[012]|a[012]|g[12])\.weight", "RWKV's small matrices", float32=False),
    _row(r"altup_(correct|predict)_coef", "altup's matrices are tiny", float32=True),
    _row(r"altup|laurel|per_layer_model_proj", "small beside the layer", float32=False),
    _row(r"indexer\.[kq]_proj\.weight", "the indexer's projections are tiny", float32=False),
    _row(r"attn_rel_b\.weight", "relative position biases are added, not multiplied", float32=False),
    _row(r"\.position_embd", "positions are added, not multiplied", float32=True),
    _row(r"sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd|\.patch_merger", "part of an image encoder",
         float32=False),
    _row(r"a\.rvq\.codebook|mm\.a\.code_embd", "an audio codebook", float32=False),
)  # fmt: skip

_BY_ARCHITECTURE = {
    "glm5-next": (
        _row(
            r"hc_|indexer\.(attn_q_b|attn_k|proj)|indexer_compressor_(gate|ape)"
            r"|ssm_([fg]_[ab]|beta)\.weight|attn_(kv_a_mqa|k_b|v_b)\.weight",
            "small and sensitive in this architecture",
            float32=False,
        ),
    )
}


def matrix_axes(shape: tuple[int, ...]) -> int:
    """Number of axes as ggml counts them: leading axes of length 1 do not exist."""
    axes = len(shape)
    while axes > 1 and shape[len(shape) - axes] == 1:
        axes -= 1
    return axes


def is_float(type: str) -> bool:
    """Whether numbers of this type are weights: not an index table, a mask or float64."""
    return type in _HALVES | _FLOAT8 | {"F32"} or block_and_bytes(type)[0] > 1


def kept(spec: TensorSpec, architecture: str) -> Kept | None:
    """Why this tensor is not quantized and how it is stored instead; None for one that may be quantized."""
    if not is_float(spec.type):
        return Kept(f"{spec.type} is copied", spec.type)
    if matrix_axes(spec.shape) < 2:
        return Kept("vectors stay F32", _float_type(spec.type, float32=True))
    if not spec.name.endswith("weight"):
        return Kept("not a weight matrix", _float_type(spec.type, float32=True))
    for row in (*_ROWS, *_BY_ARCHITECTURE.get(architecture, ())):
        if row.pattern.search(spec.name):
            return Kept(row.reason, _float_type(spec.type, float32=row.float32))
    return None


def _float_type(type: str, *, float32: bool) -> str:
    if type in _FLOAT8 or (float32 and type in _HALVES):
        return "F32"
    return type
