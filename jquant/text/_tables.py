"""Texts and chats in rows, read as they are asked for: JSON lines, parquet, lines of plain text.

A row is {"text": …} or {"messages": [{"role": …, "content": …}, …]}; messages win where it has both. A row
whose text is null or empty has no text.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jquant.core import UserError, parse_json

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET, PLAIN, PACKED = ".parquet", ".txt", ".gz"
FILES = (PARQUET, *(end + packed for end in (*JSON_LINES, PLAIN) for packed in ("", PACKED)))
_COLUMNS = ("messages", "text")
_BATCH = 64  # rows of a parquet file decoded at a time
_BUFFER = 1 << 20  # bytes of a parquet column read at a time


class Row(NamedTuple):
    where: str  # "train.parquet, row 12"
    content: str | list  # a text, or the messages of a chat

    @property
    def is_blank(self) -> bool:
        return isinstance(self.content, str) and not self.content.strip()


@dataclass(frozen=True)
class Table:
    """Rows of one or several files, each downloaded and opened when its rows are asked for."""

    name: str
    parts: tuple[Callable[[], Iterator[Row]], ...]


def rows_of_file(path: Path, name: str) -> Iterator[Row]:
    """The rows of a file of one of the kinds in FILES; its kind is told by the end of `name`.

    Raises UserError, which names line or row, where the file is damaged or a row is of another form.
    """
    if name.endswith(PARQUET):
        yield from _parquet_rows(path, name)
        return
    with closing(_lines(path, name)) as lines:
        if name.removesuffix(PACKED).endswith(PLAIN):
            for number, line in enumerate(lines, 1):
                yield Row(f"{name}, line {number}", line if line.endswith("\n") else f"{line}\n")
        else:
            yield from json_rows(name, lines)


def json_rows(name: str, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: is not JSON ({error}); give JSON lines, an object a line.") from None
        if not isinstance(entry, Mapping) or not entry.keys() & set(_COLUMNS):
            raise UserError(f'{where}: expected {{"text": …}} or {{"messages": […]}}.')
        yield _row(where, entry)


def check_unicode(content: str, where: str) -> None:
    """JSON can escape one half of a surrogate pair, which no tokenizer can take."""
    try:
        content.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(content[error.start]):04x}"
        raise UserError(
            f"{where}: has {half} at character {error.start} without its other half, which is no text; mend "
            "or delete the line."
        ) from None


def _row(where: str, entry: Mapping) -> Row:
    if (messages := entry.get("messages")) is not None:
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise UserError(f'{where}: \'messages\' must be a list of {{"role": …, "content": …}}.')
        return Row(where, messages)
    text = "" if entry.get("text") is None else entry["text"]
    if not isinstance(text, str):
        raise UserError(f"{where}: 'text' is {type(text).__name__}, not text.")
    check_unicode(text, where)
    return Row(where, text)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _lines(path: Path, name: str) -> Generator[str, None, None]:
    number = 0
    try:
        with (gzip.open if name.endswith(PACKED) else open)(path, "rt", encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                yield line
    except UnicodeDecodeError:
        raise UserError(f"{name}: no UTF-8 text after line {number}; give a text file.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name}: is damaged after line {number} ({error}); fetch it again.") from None


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{name}: parquet is read by pyarrow, which is not installed: pip install pyarrow."
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = [column for column in _COLUMNS if column in names]
            if not columns:
                raise UserError(
                    f"{name}: has neither a column 'text' nor 'messages', but {', '.join(names) or 'none'}; "
                    "rename the one to calibrate on."
                )
            for batch in file.iter_batches(_BATCH, columns=columns):
                for entry in batch.to_pylist():
                    number += 1
                    yield _row(f"{name}, row {number}", entry)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: is no whole parquet file after row {number} ({reason}).") from None
