"""FORMATS: every Format by name, collected from the modules beside this one. A format is one file.

SCALED_FORMATS: those whose codes and scales are tensors of their own, as safetensors have them.
"""

from jquant.formats._quantize import quantize
from jquant.formats._table import FORMATS, SCALED_FORMATS, format_of

__all__ = [
    "FORMATS",
    "SCALED_FORMATS",
    "format_of",
    "quantize",
]
