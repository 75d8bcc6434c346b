"""Inputs of matrices as 8-bit numbers, and the product in integers."""

from jquant.int8._kernel import int8_rows
from jquant.int8._matmul import matmul, pallas_dot, xla_dot

__all__ = [
    "int8_rows",
    "matmul",
    "pallas_dot",
    "xla_dot",
]
