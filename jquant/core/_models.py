"""A model whose blocks are run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jax import Array

_T = TypeVar("_T")


@runtime_checkable
class Block(Protocol):
    """One block of a model: a Flax module that shows what each matrix is given in the collection "inputs":
    {"x": [s, t, width]}, or for a stack of experts {"x": [tiles, tile, width], "expert": [tiles], "token":
    [tiles, tile]}, where token counts from the first of all samples and −1 marks a row without one. What the
    collection "nudges" has under the same names, {"y": …}, is added to the outputs of these matrices."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the parameters: ("ffn_down.weight", (out, in))

    def apply(
        self, variables: Mapping, x: Array, angles: Array, *, mutable: str
    ) -> tuple[Array, Mapping]: ...


def block_parameters(
    shapes: Iterable[tuple[str, tuple[int, ...]]], value: Callable[[str, tuple[int, ...]], _T]
) -> dict[str, dict[str, _T]]:
    """What a block is applied to, {"attn_q": {"weight": …}}, of value(name, shape) for each of its `shapes`.
    A matrix of one row, which is stored as a vector, is a matrix again."""
    found: dict[str, dict[str, _T]] = {}
    for name, shape in shapes:
        module, _, kind = name.partition(".")
        row = kind == "weight" and "norm" not in module and len(shape) == 1
        found.setdefault(module, {})[kind] = value(name, (1, *shape) if row else shape)
    return found


@runtime_checkable
class BlockwiseModel(Protocol):
    """A model whose blocks are run one after the other, each loaded when it is its turn."""

    @property
    def blocks(self) -> Sequence[Block]: ...

    def embed(self, tokens: np.ndarray) -> np.ndarray: ...

    def load_block(self, i: int) -> dict[str, dict[str, Array]]: ...

    def angles(self, i: int, tokens: int) -> np.ndarray: ...

    def logits(self, x: Array) -> Array: ...


def output_name(names: Container[str]) -> str:
    """The output matrix among a model's tensors: token embeddings serve as one where there is no other."""
    return "output.weight" if "output.weight" in names else "token_embd.weight"


@runtime_checkable
class Head(Protocol):
    """What follows the last block of a model: a norm, and the output matrix, read in slabs of rows."""

    @property
    def output_name(self) -> str: ...

    @property
    def tied(self) -> bool: ...  # its rows are the embeddings of tokens too

    def output_slabs(self) -> list[tuple[int, int]]: ...

    def output_rows(self, start: int, stop: int) -> np.ndarray: ...

    def output_inputs(self, x: Array) -> Array: ...
