"""`jquant inspect MODEL`: what is in a file, from its header alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from . import _errors, _show

LONGEST = 12  # values of an array that are shown


@_errors.one_line_errors
def inspect(
    model: Annotated[Path, typer.Argument(help="GGUF file (any shard of it) or Hugging Face folder.")],
    pattern: Annotated[
        str | None,
        typer.Option("--filter", help="Only tensors and keys whose name has a match for this regex."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show metadata, tensors and size by type. Reads the header, never the weights."""
    from jquant import io
    from jquant.core.human import human_shape, human_size, text_table
    from jquant.plan.report import type_table

    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise typer.BadParameter(f"{pattern!r} is not a regular expression: {error}") from None
    source = io.open_source(model)
    specs = [spec for name, spec in source.specs.items() if wanted.search(name)]
    metadata = {k: v for k, v in getattr(source, "metadata", {}).items() if wanted.search(k)}
    if json:
        tensors = [{"name": s.name, "shape": list(s.shape), "type": s.type, "bytes": s.nbytes} for s in specs]
        _show.result_json({"metadata": {k: _plain(v) for k, v in metadata.items()}, "tensors": tensors})
        return
    if metadata:
        _show.result(text_table(("key", "value"), [(k, _short(v)) for k, v in metadata.items()]) + "\n")
    rows = [(s.name, human_shape(s.shape), s.type, human_size(s.nbytes)) for s in specs]
    _show.result(text_table(("tensor", "shape", "type", "size"), rows, (3,)) + "\n")
    _show.result(type_table(specs))


def _plain(value: object) -> object:
    """A metadata value as JSON knows it."""
    return getattr(value, "tolist", lambda: value)()


def _short(value: object) -> str:
    """A metadata value on one line."""
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0):
        items = list(value[:LONGEST])  # pyright: ignore[reportIndexIssue]
        more = f", … ({len(value)} values)" if len(value) > LONGEST else ""  # pyright: ignore[reportArgumentType]
        return f"[{', '.join(repr(_plain(v)) for v in items)}{more}]"
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= 80 else f"{text[:77]}… ({len(text)} characters)"
