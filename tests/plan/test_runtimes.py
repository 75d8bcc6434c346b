"""Which types llama.cpp computes with, asked of the library that llama-cpp-python carries."""

from __future__ import annotations

from helpers import ggml

from jquant.core import GGML_TYPES
from jquant.plan import RUNTIMES, runtime_types
from jquant.plan.rules import TENSOR_TYPES


def test_the_cpu_runs_the_types_that_have_a_product_in_ggml():
    """Types that are newer than the library are not asked for."""
    known = {type for type in TENSOR_TYPES if ggml.has_type(GGML_TYPES[type])}
    assert len(known) > 20
    of_cpu = runtime_types("llama.cpp-cpu")
    assert {type for type in known if ggml.has_product(GGML_TYPES[type])} == known & of_cpu


def test_what_a_gpu_runs_the_cpu_runs_too():
    assert all(types <= runtime_types("llama.cpp-cpu") for types in RUNTIMES.values())
