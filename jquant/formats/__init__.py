"""FORMATS: every Format by name, collected from the modules beside this one. A format is one file.

SCALED_FORMATS: those whose codes and scales are tensors of their own, as safetensors have them.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import MappingProxyType
from typing import TypeVar

from jquant.core import Format, ScaledFormat

_F = TypeVar("_F", Format, ScaledFormat)


def _collect(kind: type[_F]) -> dict[str, _F]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
            found |= {m.name: m for m in members if isinstance(m, kind)}
    return found


FORMATS = MappingProxyType(_collect(Format))
SCALED_FORMATS = MappingProxyType(_collect(ScaledFormat))
