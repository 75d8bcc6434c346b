"""What is usual for a type, and for a tensor of a role and depth: damages before anything is measured.

damage(tensor, type) = weight(tensor) · error(type), as in `sensitivity`. On SmolLM2-135M the logarithm of a
measured error is a sum of one term for the tensor, ±0.5, and one for the type, up to 0.1; the second is here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from jquant.models import matrix

_OTHER = 2.0  # nats a token for a relative error of 1, of names that no kind of block has
_OUTPUT, _EMBEDDING = 20.0, 2.0
_OUTER = 4.0  # times as much for the MLPs of the first and the last layer: the least of what was measured

# Relative errors with importance: medians over the matrices of stories15M, which was trained in float32, with
# an imatrix of TinyStories. Without importance all are some 15% larger.
_ERRORS = {
    "Q1_0": 0.369, "TQ1_0": 0.196, "TQ2_0": 0.196, "IQ1_S": 0.187, "IQ1_M": 0.158, "Q2_0": 0.118,
    "IQ2_XXS": 0.098, "IQ2_XS": 0.0733, "Q2_K": 0.0599, "IQ2_S": 0.0525, "IQ3_XXS": 0.0282, "Q3_K": 0.0195,
    "IQ3_S": 0.0152, "MXFP4": 0.013, "NVFP4": 0.00705, "Q4_0": 0.00634, "IQ4_XS": 0.00514, "IQ4_NL": 0.00507,
    "Q4_K": 0.00446, "Q4_1": 0.00436, "Q5_0": 0.00155, "Q5_K": 0.00107, "Q5_1": 0.00101, "Q6_K": 0.000248,
    "Q8_0": 2.06e-5,
}  # fmt: skip
_ON_GRID = 0.02  # times this, where the weights are those of a file with as many even steps


def usual_weights(names: Collection[str], layers: int) -> dict[str, float]:
    """Weights by matrix and depth. layers: of the model."""
    is_tied = "output.weight" not in names
    found = {}
    for name in names:
        part = re.fullmatch(r"blk\.(\d+)\.(\w+?)(_exps|_shexp)?\.weight", name)
        if part is None:
            is_output = name == "output.weight" or (name == "token_embd.weight" and is_tied)
            found[name] = _OUTPUT if is_output else _EMBEDDING
            continue
        row = matrix(part[2] + (part[3] or "")) or matrix(part[2])
        is_mlp = part[2].startswith("ffn_") if row is None else row.role in ("mlp", "expert")
        outer = is_mlp and int(part[1]) in (0, layers - 1)
        weight = _OTHER if row is None else row.sensitivity
        found[name] = weight / max(layers, 1) * (_OUTER if outer else 1.0)
    return found


def usual_errors(types: Iterable[str], bits: int | None = None) -> dict[str, float]:
    """The error to expect of each type. Types that are no quantization have none.

    bits: of the codes of the quantized file that the weights seem to come from, see `sensitivity.grid_bits`.
    Types of even steps with as many bits reach almost all of such weights.
    """
    found = {type: _ERRORS.get(type, 0.0) for type in types}
    if bits is not None:
        for type in found:
            even = re.fullmatch(r"Q(\d)_[01K]", type)
            if even and int(even[1]) >= bits:
                found[type] *= _ON_GRID
    return found
