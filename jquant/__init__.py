"""jquant: quantize language models with JAX, without Torch."""

from jquant.core import Format, QuantizedTensor, dequantize, quantize
from jquant.formats import FORMATS

__all__ = ["FORMATS", "Format", "QuantizedTensor", "dequantize", "quantize"]
