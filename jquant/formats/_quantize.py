"""`quantize`, with formats by name."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from jquant import core
from jquant.core import Effort, Format, QuantizedTensor, ScaledFormat
from jquant.formats._table import format_of


def quantize(
    x: Float[Array, "*rows cols"],
    format: Format | ScaledFormat | str,
    importance: Float[Array, "..."] | None = None,
    *,
    effort: Effort = "fast",
) -> QuantizedTensor:
    """Encode `x`, whose last axis is a whole number of the format's blocks.

    The bytes are the same eagerly and under `jit`, `vmap`, `lax.map` and `shard_map`, and of GGUF's formats
    those that the file has.

    Args:
        x: weights [*rows, cols].
        format: of FORMATS or SCALED_FORMATS, or its name: "Q4_K".
        importance: weight of each weight's squared error, of x's shape or broadcast to it; [cols] is the
            imatrix of the layer's inputs.
        effort: "best" searches some five times as long as "fast"; a ScaledFormat has one search.

    Raises:
        ValueError: no format has this name, it cannot be encoded, or the shapes do not fit.

    >>> w = jax.random.normal(jax.random.key(0), (4, 256))
    >>> q = jquant.quantize(w, "IQ2_XXS", importance=jnp.ones(256))
    >>> q.shape, q.nbytes, jquant.dequantize(q).shape
    ((4, 256), 264, (4, 256))
    """
    return core.quantize(x, format_of(format), importance, effort=effort)
