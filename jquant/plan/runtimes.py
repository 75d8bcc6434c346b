"""Which types each of llama.cpp's backends computes with; others it refuses, or moves to the CPU.

CPU: ggml-cpu.c, type_traits_cpu. CUDA: ggml-cuda.cu, supports_op of MUL_MAT (llama.cpp 00108827): all but the
ternary types. Metal: ggml-metal.metal, the instances of kernel_mul_mm. Its supports_op takes every type, and
one without a kernel ends the process; so Q1_0, Q2_0 and TQ2_0, of which only late files of 2026 have kernels,
are left out with NVFP4 and TQ1_0.
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
