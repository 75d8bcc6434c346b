"""Engines that run a model on tokens: our own in Flax, which reads every format and holds one block at a
time, and llama.cpp, which is what the user of a GGUF file will run.

Both give the same logits up to rounding: llama.cpp rounds the inputs of quantized matrices to 8 bits and its
cache of keys and values to float16, ours computes in float32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from jquant import core
from jquant.core import UserError
from jquant.evaluation.engine import Engine, Progress
from jquant.evaluation.flax_engine import FlaxEngine
from jquant.evaluation.llama_cpp_engine import LlamaCppEngine

__all__ = [
    "ENGINES",
    "LLAMA_CPP",
    "Engine",
    "FlaxEngine",
    "LlamaCppEngine",
    "Progress",
    "choose",
    "open_engine",
]

JAX, LLAMA_CPP = "jax", "llama.cpp"
ENGINES = (JAX, LLAMA_CPP)


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def choose(name: str | None, folders: Sequence[Path]) -> str:
    """The engine for all models, of which `folders` are no GGUF files; without a name llama.cpp where it is
    installed and can run them.

    Raises UserError where llama.cpp is asked for and cannot be used.
    """
    if name is None:
        return JAX if folders or not has_llama_cpp() else LLAMA_CPP
    if name not in ENGINES:
        raise UserError(f"engine {name!r}: not known; choose from {', '.join(ENGINES)}.")
    if name == LLAMA_CPP:
        require_llama_cpp()
        if folders:
            raise UserError(f"{folders[0]}: llama.cpp reads GGUF files only; use --engine jax.")
    return name


def require_llama_cpp() -> None:
    """Raises UserError, with the command that installs it, where llama.cpp is missing."""
    if not has_llama_cpp():
        raise UserError("llama-cpp-python is not installed: pip install llama-cpp-python.")


def open_engine(name: str, path: Path, *, threads: int, pre_tokenizer: str | None = None) -> Engine:
    """Raises UserError where the model cannot be run. pre_tokenizer: as in `open_model`."""
    return (
        FlaxEngine(path, pre_tokenizer=pre_tokenizer)
        if name == JAX
        else LlamaCppEngine(path, threads=threads)
    )


def versions() -> dict[str, str]:
    """Of what figures depend on; llama.cpp's where it is installed."""
    return core.versions("jax", "jaxlib", *(["llama-cpp-python"] if has_llama_cpp() else []))
