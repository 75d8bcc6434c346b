"""Codes and numbers fitted to the original's output on text: LDLQ block by block, then tuning."""

from jquant.ldlq._forecast import Forecast, forecast
from jquant.ldlq._quantize import quantize

__all__ = [
    "Forecast",
    "forecast",
    "quantize",
]
