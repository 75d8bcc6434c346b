"""Text to evaluate on, which no model was calibrated on."""

from __future__ import annotations

from pathlib import Path

from jquant.core import UserError
from jquant.text._python_texts import pydoc
from jquant.text.samples import PYDOC, WIKITEXT2, Text, wikitext2

_PART = "the last quarter of Python's manual pages, which calibration on pydoc has seen"


def read_held_out(text: str | None) -> Text:
    """A file of plain text, "wikitext2" (its test part, from the hub), "pydoc" (the end of Python's manual
    pages), or None: the first of these two that is there.

    Raises UserError where the file cannot be read or the hub does not answer.
    """
    if text == PYDOC:
        return _pydoc(())
    if text == WIKITEXT2:
        return wikitext2("test")
    if text is None:
        try:
            return wikitext2("test")
        except UserError as error:
            return _pydoc((f"{error} Evaluating on {_PART}; --text FILE is better.",))
    path = Path(text)
    if path.name.endswith((".jsonl", ".ndjson", ".parquet")):
        raise UserError(f"{path}: chunks are cut from running text; give a plain text file.")
    try:
        return Text(path.name, path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give a text file, {WIKITEXT2} or {PYDOC}."
        ) from None


def _pydoc(remarks: tuple[str, ...]) -> Text:
    whole = pydoc()
    start = whole.index(b"\n\n", 3 * len(whole) // 4)
    return Text("the last quarter of pydoc", whole[start:].strip(), remarks)
