"""Which types each of llama.cpp's backends computes with; others it refuses, or moves to the CPU.

Source: ggml-cuda.cu, supports_op of MUL_MAT; ggml-metal.metal, the instances of kernel_mul_mm; ggml-cpu.c,
type_traits_cpu. The newest types (Q1_0, Q2_0, NVFP4) need a llama.cpp of 2026; Metal's are left out.
"""

from __future__ import annotations

import difflib
from types import MappingProxyType

from jquant.core import UserError
from jquant.plan.rules import TENSOR_TYPES

_CPU = frozenset(TENSOR_TYPES)
_CUDA = _CPU - {"TQ1_0", "TQ2_0"}
_METAL = _CUDA - {"NVFP4", "Q1_0", "Q2_0"}

RUNTIMES = MappingProxyType({"llama.cpp-cpu": _CPU, "llama.cpp-cuda": _CUDA, "llama.cpp-metal": _METAL})


def runtime_types(name: str) -> frozenset[str]:
    """Raises UserError, with the known names, for another runtime."""
    if name not in RUNTIMES:
        close = difflib.get_close_matches(name, RUNTIMES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(RUNTIMES)}."
        raise UserError(f"unknown runtime {name!r}; {hint}")
    return RUNTIMES[name]
