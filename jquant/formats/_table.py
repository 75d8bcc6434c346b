"""FORMATS and SCALED_FORMATS, and the answer to a name that is in neither."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import gguf

from jquant.core import Format, ScaledFormat

_F = TypeVar("_F", Format, ScaledFormat)

_SCHEME = re.compile(r"W\d+A\d+|GPTQ|AWQ")


class _Table(dict[str, _F]):
    """By name; another name is answered with what is meant."""

    def __missing__(self, name: object) -> _F:
        raise KeyError(_meant(name, self))


def _collect(kind: type[_F]) -> Mapping[str, _F]:
    table = _Table[_F]()
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.name.startswith("_"):
            members = vars(importlib.import_module(f"{__package__}.{module.name}")).values()
            table |= {m.name: m for m in members if isinstance(m, kind)}
    return MappingProxyType(table)


def _meant(name: object, asked: Iterable[str]) -> str:
    """What a name that `asked` has no format of means, and what to do."""
    told, upper = f"{name!r}", str(name).upper()
    file_types = {t.name.removeprefix("MOSTLY_") for t in gguf.LlamaFileType}
    if upper in file_types and upper not in FORMATS:
        told += f" is a file type, a mixture for a whole model: jquant.to_gguf(…, type={upper!r})"
    elif _SCHEME.fullmatch(upper):
        told += f" is a scheme of a whole folder: jquant.to_folder(…, scheme={upper!r})"
    elif (known := _nearest(name)) is None:
        told += " is no format"
    elif known in asked:
        return f"{told} is no format; {known!r} is meant."
    else:
        table = "FORMATS" if known in FORMATS else "SCALED_FORMATS"
        return f"{told} is not in this table; jquant.{table}[{known!r}] is meant."
    return f"{told}; formats of a tensor: {', '.join(asked)}."


def _nearest(name: object) -> str | None:
    """The format that is meant by a name that is nearly its own."""
    plain = {re.sub(r"\W|_", "", known): known for known in (*FORMATS, *SCALED_FORMATS)}
    near = difflib.get_close_matches(re.sub(r"\W|_", "", str(name).upper()), plain, n=1, cutoff=0.8)
    return plain[near[0]] if near else None


FORMATS: Mapping[str, Format] = _collect(Format)
SCALED_FORMATS: Mapping[str, ScaledFormat] = _collect(ScaledFormat)


def format_of(format: Format | ScaledFormat | str) -> Format | ScaledFormat:
    """A format itself, or the one of this name. Raises ValueError for a name that no format has."""
    if not isinstance(format, str):
        return format
    if format in SCALED_FORMATS:
        return SCALED_FORMATS[format]
    if format in FORMATS:
        return FORMATS[format]
    raise ValueError(f"format={_meant(format, (*FORMATS, *SCALED_FORMATS))}")
