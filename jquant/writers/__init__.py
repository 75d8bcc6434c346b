"""GGUF files and Hugging Face folders, from a model, a plan and what was measured."""

from jquant.writers._quantized_folder import QuantizedFolder
from jquant.writers._to_folder import to_folder

__all__ = [
    "QuantizedFolder",
    "to_folder",
]
