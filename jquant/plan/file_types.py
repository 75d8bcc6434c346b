"""llama.cpp's file types: the mixtures that a user asks for by name, each built on one tensor type.

`general.file_type` of a GGUF file holds the number. llama-quantize takes the same names, in any case, the
same aliases, and the number itself.
Source: llama.h (enum llama_ftype), tools/quantize/quantize.cpp and llama_ftype_get_default_type of llama.cpp.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

from jquant.core import TensorSpec, UserError


class FileType(NamedTuple):
    name: str
    number: int  # general.file_type
    base: str  # the tensor type of whatever the mixture does not single out
    about: str  # for --help; sizes are those of an 8-billion-weight Llama 3


_TABLE = (
    FileType("F32", 0, "F32", "32 bits: exact, large"),
    FileType("BF16", 32, "BF16", "16 bits with float32's range: exact for most published models"),
    FileType("F16", 1, "F16", "16 bits: the usual form to quantize from"),
    FileType("Q8_0", 7, "Q8_0", "8.5 bpw: practically lossless"),
    FileType("Q6_K", 18, "Q6_K", "6.6 bpw: very close to the original"),
    FileType("Q5_K_M", 17, "Q5_K", "5.7 bpw: hardly any loss"),
    FileType("Q5_K_S", 16, "Q5_K", "5.6 bpw"),
    FileType("Q4_K_M", 15, "Q4_K", "4.9 bpw: the usual choice"),
    FileType("Q4_K_S", 14, "Q4_K", "4.7 bpw"),
    FileType("IQ4_NL", 25, "IQ4_NL", "4.7 bpw: 16 uneven levels, blocks of 32"),
    FileType("IQ4_XS", 30, "IQ4_XS", "4.4 bpw: 16 uneven levels, the best below Q4_K_S"),
    FileType("Q3_K_L", 13, "Q3_K", "4.3 bpw"),
    FileType("Q3_K_M", 12, "Q3_K", "4.0 bpw: noticeable loss"),
    FileType("Q3_K_S", 11, "Q3_K", "3.6 bpw"),
    FileType("IQ3_M", 27, "IQ3_S", "3.8 bpw"),
    FileType("IQ3_S", 26, "IQ3_S", "3.7 bpw"),
    FileType("IQ3_XS", 22, "IQ3_S", "3.5 bpw, needs an imatrix"),
    FileType("IQ3_XXS", 23, "IQ3_XXS", "3.3 bpw, needs an imatrix"),
    FileType("Q2_K", 10, "Q2_K", "3.2 bpw: marked loss"),
    FileType("Q2_K_S", 21, "Q2_K", "3.0 bpw, needs an imatrix"),
    FileType("IQ2_M", 29, "IQ2_S", "2.9 bpw, needs an imatrix"),
    FileType("IQ2_S", 28, "IQ2_XS", "2.7 bpw, needs an imatrix"),
    FileType("IQ2_XS", 20, "IQ2_XS", "2.6 bpw, needs an imatrix"),
    FileType("IQ2_XXS", 19, "IQ2_XXS", "2.4 bpw, needs an imatrix"),
    FileType("IQ1_M", 31, "IQ1_M", "2.1 bpw, needs an imatrix"),
    FileType("IQ1_S", 24, "IQ1_S", "2.0 bpw, needs an imatrix: the smallest"),
    FileType("Q5_1", 9, "Q5_1", "6.0 bpw, blocks of 32: for rows that are no multiple of 256"),
    FileType("Q5_0", 8, "Q5_0", "5.6 bpw, blocks of 32"),
    FileType("Q4_1", 3, "Q4_1", "5.1 bpw, blocks of 32"),
    FileType("Q4_0", 2, "Q4_0", "4.7 bpw, blocks of 32: fast on many CPUs"),
    FileType("MXFP4_MOE", 38, "MXFP4", "experts in MXFP4, 4-bit floats, the rest in Q8_0"),
    FileType("NVFP4", 39, "NVFP4", "4.6 bpw: 4-bit floats, a scale for 16"),
    FileType("TQ2_0", 37, "TQ2_0", "2.5 bpw, for models trained with ternary weights"),
    FileType("TQ1_0", 36, "TQ1_0", "2.2 bpw, for models trained with ternary weights"),
    FileType("Q2_0", 41, "Q2_0", "2.7 bpw, for models trained for two bits"),
    FileType("Q1_0", 40, "Q1_0", "1.5 bpw, for models trained with binary weights"),
)

FILE_TYPES = MappingProxyType({kind.name: kind for kind in _TABLE})
ALIASES = MappingProxyType({"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"})
_BY_NUMBER = {str(kind.number): kind.name for kind in _TABLE}


def file_type(name: str) -> FileType:
    """The file type of this name (any case), alias or number; UserError with the close names otherwise."""
    key = name.strip().upper()
    key = ALIASES.get(key, _BY_NUMBER.get(key, key))
    if key in FILE_TYPES:
        return FILE_TYPES[key]
    close = difflib.get_close_matches(key, [*FILE_TYPES, *ALIASES], n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"choose one of {', '.join(FILE_TYPES)}."
    raise UserError(f"unknown file type {name!r}; {hint}")


def nearest_file_type(layout: Sequence[TensorSpec]) -> FileType:
    """The file type to state in the header: one whose base has most of the weights."""
    weights: Counter[str] = Counter()
    for spec in layout:
        weights[spec.type] += spec.size
    for type, _ in weights.most_common():
        kinds = [kind for kind in FILE_TYPES.values() if kind.base == type]
        if kinds:
            return kinds[0]
    return FILE_TYPES["Q4_K_M"]
