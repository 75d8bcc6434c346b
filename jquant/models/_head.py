"""What follows the last block, as a block more: a calibrator then sees what the output matrix is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jquant.core import Block
from jquant.models._decoder import Decoder, Parameters
from jquant.models._layers import RMSNorm, Shapes, Shown


class _Head(nn.Module):
    """A Block that shows its norm's output under the name of the matrix "output", which it does not load."""

    shapes: Shapes
    eps: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "s t width"], angles: Float[Array, "t pairs"]
    ) -> Float[Array, "s t width"]:
        Shown(name="output")(RMSNorm(self.eps, name="output_norm")(x))
        return x


@dataclass(frozen=True)
class WithHead:
    """A BlockwiseModel: the decoder's blocks, and its head as the last."""

    decoder: Decoder

    @property
    def blocks(self) -> Sequence[Block]:
        width = self.decoder.width
        shapes = (("output_norm.weight", (width,)), ("output.weight", (self.decoder.vocab, width)))
        return (*self.decoder.blocks, _Head(shapes, self.decoder.eps))

    @property
    def output_place(self) -> str:
        """What the output matrix is called among the matrices of blocks."""
        return f"blk.{len(self.decoder.blocks)}.output.weight"

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.decoder.embed(tokens)

    def load_block(self, i: int) -> Parameters:
        if i < len(self.decoder.blocks):
            return self.decoder.load_block(i)
        return {"output_norm": {"weight": jnp.asarray(self.decoder.tensors.tensor("output_norm.weight"))}}

    def angles(self, i: int, tokens: int) -> np.ndarray:
        return self.decoder.angles(min(i, len(self.decoder.blocks) - 1), tokens)

    def logits(self, x: Array) -> Array:
        return self.decoder.logits(x)
