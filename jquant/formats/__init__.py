"""FORMATS: every Format by name, collected from the modules beside this one. A format is one file."""

from __future__ import annotations

import importlib
import pkgutil
from types import MappingProxyType

from jquant.core import Format


def _collect() -> dict[str, Format]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
            found |= {m.name: m for m in members if isinstance(m, Format)}
    return found


FORMATS = MappingProxyType(_collect())
