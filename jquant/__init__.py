"""jquant: quantize language models with JAX, without Torch."""

from jquant.core import Format, QuantizedTensor, ScaledFormat, dequantize, quantize
from jquant.formats import FORMATS, SCALED_FORMATS

__all__ = [
    "FORMATS",
    "SCALED_FORMATS",
    "Format",
    "QuantizedTensor",
    "ScaledFormat",
    "dequantize",
    "quantize",
]
