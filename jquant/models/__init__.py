"""ARCHITECTURES: every architecture by the name that config.json gives. An architecture is one file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from jquant.core import UserError

from ._shared import Architecture


def _collect() -> dict[str, Architecture]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
            found |= {m.name: m for m in members if isinstance(m, Architecture)}
    return found


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(_collect())


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
