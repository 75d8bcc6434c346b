"""ggml's own C encoders and decoders, through the library that llama-cpp-python carries: the test oracle."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

_lib = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))))
_floats = ctypes.POINTER(ctypes.c_float)
_lib.ggml_quantize_chunk.restype = ctypes.c_size_t
_lib.ggml_quantize_chunk.argtypes = [
    ctypes.c_int, _floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _floats,
]  # fmt: skip


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, _floats, ctypes.c_int64)),
        ("from_float_ref", ctypes.CFUNCTYPE(None, _floats, ctypes.c_void_p, ctypes.c_int64)),
    ]


_lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
_lib.ggml_get_type_traits.argtypes = [ctypes.c_int]


def block_and_bytes(ggml_type: int) -> tuple[int, int]:
    """Weights and bytes of a block; gguf-py's own table lags behind ggml's."""
    traits = _lib.ggml_get_type_traits(ggml_type).contents
    return traits.blck_size, traits.type_size


class _CpuTypeTraits(ctypes.Structure):
    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


_lib.ggml_type_name.restype = ctypes.c_char_p


def has_type(ggml_type: int) -> bool:
    """Whether the library is new enough to know it."""
    return (_lib.ggml_type_name(ggml_type) or b"NONE") != b"NONE"


def has_product(ggml_type: int) -> bool:
    """Whether the CPU backend multiplies with matrices of this type."""
    cpu = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-cpu.*"))))
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTypeTraits)
    return bool(cpu.ggml_get_type_traits_cpu(ggml_type).contents.vec_dot)


def encode(ggml_type: int, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """x [rows, cols] float32 → uint8 [rows, row bytes]; importance [cols], as llama-quantize passes it."""
    rows, cols = x.shape
    x = np.ascontiguousarray(x, np.float32)
    block, size = block_and_bytes(ggml_type)
    out = np.zeros((rows, cols // block * size), np.uint8)
    weights = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        weights = importance.ctypes.data_as(_floats)
    written = _lib.ggml_quantize_chunk(
        ggml_type, x.ctypes.data_as(_floats), out.ctypes.data, 0, rows, cols, weights
    )
    assert written == out.nbytes, (written, out.nbytes)
    return out


def decode(ggml_type: int, data: np.ndarray) -> np.ndarray:
    """uint8 [rows, row bytes] → float32 [rows, cols], by ggml's to_float."""
    data = np.ascontiguousarray(data)
    block, size = block_and_bytes(ggml_type)
    out = np.empty((data.shape[0], data.shape[1] // size * block), np.float32)
    traits = _lib.ggml_get_type_traits(ggml_type).contents
    traits.to_float(data.ctypes.data, out.ctypes.data_as(_floats), out.size)
    return out
