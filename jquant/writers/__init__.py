"""GGUF files and Hugging Face folders, from a model, a plan and what was measured."""

from jquant.writers._gguf_file import GgufFile
from jquant.writers._quantized_folder import QuantizedFolder
from jquant.writers._to_folder import to_folder
from jquant.writers._to_gguf import to_gguf

__all__ = [
    "GgufFile",
    "QuantizedFolder",
    "to_folder",
    "to_gguf",
]
