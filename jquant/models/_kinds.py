"""KINDS: every kind of block, by name, with the one table of its matrices. A kind is one file.

A *kind* is a Flax module and what the rest must know of its tensors: in which order data meets the matrices,
which of their axes lies over `model`, which are linear layers, whose channels may be rescaled. What asks by
name alone, such as a rule for a tensor of a file, asks all kinds: a name means the same in each that has it.

Names are those of GGUF within a block, without ".weight": "attn_q" of blk.3.attn_q.weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jquant.models._header import Header, Traits
from jquant.models._layers import Block, Shapes
from jquant.models._rope import Rotary

# Stages: with room between them, for matrices that a kind has in a row.
MIXER_IN, MIXER_OUT, MLP_IN, MLP_OUT = 0, 10, 20, 30

Form = Literal["linear", "stack", "router", "other"]
Role = Literal["attention", "mlp", "expert"]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A row of a kind's table.

    stage: the order in which data meets the matrices. Those of one stage do not see each other's output;
    those of stage 0 are given the block's input, normed.
    form: "linear" [out, in] and "stack" [experts, out, in] are what schemes quantize; a "router" is a linear
    layer that they leave; "other" is no linear layer, such as the kernel of a convolution.
    over_model: which axis lies over the `model` axis of a mesh: what makes heads or hidden units is split by
    its rows, what adds them up again by its columns; None: the matrix is whole on each device.
    sensitivity: usual nats a token for a relative error of 1 in the matrices of this name in all layers. The
    known ones were measured on SmolLM2-135M from gradients; medians over layers, so that single odd layers do
    not count.
    searched_with: what it is called together with others, where their sensitivities are searched as one.
    """

    name: str
    stage: int
    role: Role
    form: Form = "linear"
    over_model: Literal["rows", "columns"] | None = None
    sensitivity: float = 2.0
    searched_with: str | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether schemes quantize it."""
        return self.form in ("linear", "stack")


class Coupling(NamedTuple):
    """Channels that `producer` gives and `consumers` take, all at once and nobody else."""

    name: str  # "attn_norm" or "ffn_up": the producer's name, or the part of it
    producer: str
    start: int  # the first row of the producer that is a channel
    channels: int
    consumers: tuple[str, ...]
    experts: int | None = None  # of a stack, each with its own channels
    heads: tuple[int, int] | None = None  # (heads that give, heads that take from each)
    before_mixing: bool = False  # an error in what the consumers are given is felt by other tokens too

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the factors."""
        return (self.channels,) if self.experts is None else (self.experts, self.channels)


@dataclass(frozen=True)
class Kind:
    """A kind of block.

    norms: names of vectors that a norm multiplies by.
    block: of (header, traits, number of the block, count of blocks, shapes) the module, and what turns heads.
    couplings: where channels may be rescaled without a change of the function; of a kind with no such place,
    none.
    """

    name: str
    matrices: tuple[Matrix, ...]
    norms: tuple[str, ...]
    block: Callable[[Header, Traits, int, int, Shapes], tuple[Block, Rotary]]
    couplings: Callable[[Block], tuple[Coupling, ...]] = lambda block: ()

    def knows(self, tensor: str) -> bool:
        """Of a tensor within a block, such as "attn_q.bias": whether the block computes with it."""
        name, _, part = tensor.rpartition(".")
        if name in self.norms:
            return part == "weight"
        row = next((row for row in self.matrices if row.name == name), None)
        return row is not None and (part == "weight" or (part == "bias" and row.form != "stack"))


KINDS: dict[str, Kind] = {}  # the public modules of this wing fill it, see `jquant.models`


def kind_of(shapes: Shapes) -> Kind | None:
    """The kind that knows each of a block's tensors."""
    return next((kind for kind in KINDS.values() if all(kind.knows(name) for name, _ in shapes)), None)


def unknown_of(shapes: Shapes) -> str:
    """The first tensor that the kind nearest to a block does not know."""
    unknown = [[name for name, _ in shapes if not kind.knows(name)] for kind in KINDS.values()]
    return min(unknown, key=len)[0]


def matrix(name: str) -> Matrix | None:
    """The row of a name, in whatever kind; None: no kind has such a matrix."""
    return next((row for kind in KINDS.values() for row in kind.matrices if row.name == name), None)


def coupling(
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
    producer: str,
    consumers: tuple[str, ...],
    *,
    start: int = 0,
    experts: int | None = None,
    heads: tuple[int, int] | None = None,
    before_mixing: bool = False,
) -> list[Coupling]:
    """One, of those consumers that there are; none without a producer or consumer. shapes: of weights."""
    there = tuple(consumer for consumer in consumers if consumer in shapes)
    if producer not in shapes or not there:
        return []
    channels = shapes[producer][0] if "norm" in producer else shapes[there[0]][-1]
    if heads is not None:
        channels //= heads[1]
    return [Coupling(name, producer, start, channels, there, experts, heads, before_mixing)]
