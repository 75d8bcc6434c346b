"""What a block computes and what its matrices are.

ARCHITECTURES: every architecture by the name that config.json gives. An architecture is one file.
KINDS: every kind of block. A kind is one file: a Flax module, and the table of its matrices.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

import gguf

from jquant.core import Metadata, UserError
from jquant.models._architecture import Architecture, Weight
from jquant.models._decoder import Decoder, Parameters, Tensors, matrices, open_decoder
from jquant.models._head import WithHead
from jquant.models._header import Header, Traits
from jquant.models._kinds import KINDS, Coupling, Kind, Matrix, kind_of, matrix
from jquant.models._layers import Block, Precision, Rounding
from jquant.models._multimodal import language_part
from jquant.models._run import inputs_of, run_and_show, run_block
from jquant.models._stages import stage, stages

__all__ = [
    "ARCHITECTURES", "KINDS", "Architecture", "Block", "Coupling", "Decoder", "Header", "Kind", "Matrix",
    "Parameters", "Precision", "Rounding", "Traits", "Weight", "WithHead", "decoder", "for_config",
    "inputs_of", "kind_of", "language_part", "matrices", "matrix", "run_and_show", "run_block", "stage",
    "stages",
]  # fmt: skip


_T = TypeVar("_T")


def _all(kind: type[_T]) -> Iterator[_T]:
    """What the public modules of this wing have of a type."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
            yield from (member for member in members if isinstance(member, kind))


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({a.name: a for a in _all(Architecture)})
KINDS.update({kind.name: kind for kind in _all(Kind)})


def for_config(config: Mapping[str, object]) -> Architecture:
    """The architecture of a config.json, its keys checked.

    Raises UserError for an architecture that is not in the table, and for a key that is not handled.
    """
    named = config.get("architectures")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(named, list) or not named:
        raise UserError(f"config.json names no model class under 'architectures'; known: {known}.")
    architecture = ARCHITECTURES.get(str(named[0]))
    if architecture is None:
        raise UserError(
            f"config.json: architecture {named[0]!r} is not supported; supported: {known}. "
            "A GGUF file of any architecture can be quantized: convert it with llama.cpp first."
        )
    architecture.read_config(config)
    return architecture


def decoder(tensors: Tensors, metadata: Metadata) -> Decoder:
    """The forward pass of a model that GGUF names and metadata describe; nothing is read yet but vectors.

    Raises UserError where the architecture's function is not known or the file is incomplete.
    """
    traits = {gguf.MODEL_ARCH_NAMES[a.gguf]: a.traits for a in ARCHITECTURES.values()}
    return open_decoder(tensors, metadata, traits)
