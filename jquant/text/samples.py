"""Text to calibrate on, as samples of tokens: a file, a dataset on the hub, or texts that need no file.

A plain text is one run of tokens, cut into consecutive samples of the sequence length; where the model wants
a BOS, it takes the place of each sample's first token. So does llama-imatrix. A row of JSON lines, of parquet
or of a dataset on the hub is one sample, cut at the sequence length; but where each row is one line with its
line end, as WikiText's are, the rows are read as a plain text, an empty one as an empty line.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from jquant.core import UserError
from jquant.io import hub
from jquant.text import _chat, _tables, datasets
from jquant.text._python_texts import pydoc, python
from jquant.text._tables import Row, Table
from jquant.text.token_ids import TokenIds

WIKITEXT2, PYDOC, PYTHON = "wikitext2", "pydoc", "python"
FEWEST, MOST = 128, 1024  # samples between which more or fewer are not worth a remark
_HEAD = 64  # rows that show whether rows are lines
_SPREAD = 16  # with a seed, samples are chosen among so many times as many, where rows are lines


@dataclass(frozen=True)
class Samples:
    """tokens: [samples, sequence length], padded with 0 behind `lengths` tokens."""

    tokens: Int32[np.ndarray, "s t"]
    lengths: Int32[np.ndarray, " s"]
    dataset: str  # name, for people
    digest: str  # SHA-256 of the text, or of the rows that were read where not all were
    remarks: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Text:
    name: str
    data: bytes
    remarks: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the data."""
        return hashlib.sha256(self.data).hexdigest()


def check(calibration: str | None) -> None:
    """Raises UserError for what `read_text` refuses before it asks the hub: a file that is not there."""
    if calibration is None or calibration in (WIKITEXT2, PYDOC, PYTHON):
        return
    if datasets.parse(calibration) is not None:
        return
    path = Path(calibration)
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give a file, {WIKITEXT2}, {PYDOC}, {PYTHON} or a "
            "dataset of the hub, such as org/name."
        ) from None


def read_text(calibration: str | None) -> Text | Table:
    """A file; a dataset on the hub, "org/name:config:split"; "wikitext2" (from the hub); "pydoc" (Python's
    manual pages); "python" (its library's source code); or None: WikiText-2 if the hub has it, else "pydoc".

    Raises UserError where the file cannot be read or the hub does not answer.
    """
    if calibration == PYDOC:
        return Text(PYDOC, pydoc())
    if calibration == PYTHON:
        if code := python():
            return Text(PYTHON, code)
        raise UserError(f"{PYTHON}: this Python has no source code of its library; give a file of code.")
    if calibration == WIKITEXT2:
        return wikitext2("train")
    if calibration is None:
        try:
            return read_text(WIKITEXT2)
        except UserError as error:
            remark = f"{error} Calibrating on Python's manual pages; --calibration FILE is better."
            return Text(PYDOC, pydoc(), (remark,))
    check(calibration)
    if datasets.parse(calibration) is not None:
        return datasets.table(calibration)
    path = Path(calibration)
    if path.name.endswith((_tables.PARQUET, _tables.PACKED)):
        return Table(path.name, (partial(_tables.rows_of_file, path, path.name),))
    return Text(path.name, path.read_bytes())


def read_texts(calibration: str | Sequence[str] | None) -> list[Text | Table]:
    """What one name or each of several means to `read_text`.

    None: prose and source code. A model fitted to prose alone loses more on code than one not fitted at all.
    """
    if calibration:
        return [read_text(name) for name in ([calibration] if isinstance(calibration, str) else calibration)]
    return [read_text(None), *([Text(PYTHON, code)] if (code := python()) else [])]


def wikitext2(part: str) -> Text:
    """ "train" or "test", unprocessed, from the archive that llama.cpp's own scripts use.

    The parquet files of Salesforce/wikitext have the same lines, but reading them takes another package.
    """
    archive = hub.dataset_file("ggml-org/ci", "wikitext-2-raw-v1.zip")
    name = f"wikitext-2-raw/wiki.{part}.raw"
    try:
        with zipfile.ZipFile(archive) as files:
            return Text(name, files.read(name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{archive}: is not the archive of WikiText-2 ({error}); delete it.") from None


def sample(
    texts: Text | Table | Sequence[Text | Table],
    tokenizer: TokenIds,
    *,
    samples: int,
    sequence_length: int,
    seed: int | None = None,
    parse_special: bool = False,
    chat_template: str | None = None,
) -> Samples:
    """At most `samples` samples: the first ones, or with a seed ones chosen at random.

    Several texts give equal shares, in turns, so that any part of the samples is of all texts. Of several
    files of a dataset, those chosen are from the first one, or from so many as have enough rows.
    chat_template: Jinja, for messages. Raises UserError where a text is empty, no text, too short, or a row
    of it is wrong.
    """
    given = [texts] if isinstance(texts, Text | Table) else list(texts)
    cut = _Cut(tokenizer, sequence_length, parse_special, chat_template)
    shares = [(samples + i) // len(given) for i in reversed(range(len(given)))]
    parts = [_part(text, cut, share, seed) for text, share in zip(given, shares, strict=True) if share]
    rows = _in_turns([part.rows for part in parts])
    remarks = [remark for part in parts for remark in part.remarks]
    if not FEWEST <= len(rows) <= MOST:
        remarks.append(f"{len(rows)} samples; {FEWEST} to {MOST} are usual.")
    tokens = np.zeros((len(rows), sequence_length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    digests = [part.digest for part in parts]
    digest = digests[0] if len(parts) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return Samples(tokens, lengths, " + ".join(text.name for text in given), digest, tuple(remarks))


class _Part(NamedTuple):
    """What one text gives."""

    rows: list[list[int]]
    digest: str
    remarks: list[str]


def _part(text: Text | Table, cut: _Cut, samples: int, seed: int | None) -> _Part:
    if isinstance(text, Table):
        rows, digest = _of_table(text, cut, samples, seed)
    else:
        decoded, digest = decode(text), text.digest
        if text.name.endswith(_tables.JSON_LINES):
            # All lines are checked, also those beyond the samples asked for.
            lines = list(_tables.json_rows(text.name, io.StringIO(decoded)))
            rows, _ = _of_table(Table(text.name, (lambda: iter(lines),)), cut, samples, seed)
        else:
            rows = cut.running(cut.encode(decoded), text.name)
    remarks = [] if isinstance(text, Table) else list(text.remarks)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(rows))[:samples]
        rows = [rows[i] for i in np.sort(order)]
    if len(rows) < samples:
        remarks.append(f"{text.name} has {len(rows)} samples of {cut.length} tokens, not {samples}.")
    return _Part(rows[:samples], digest, remarks)


def _in_turns(parts: Sequence[list[list[int]]]) -> list[list[int]]:
    """Rows of all parts, those of each spread evenly from first to last."""
    placed = [((i + 0.5) / len(rows), row) for rows in parts for i, row in enumerate(rows)]
    return [row for _, row in sorted(placed, key=lambda item: item[0])]


def decode(text: Text) -> str:
    """Raises UserError where it is empty or no text."""
    if not text.data.strip():
        raise UserError(f"{text.name}: is empty; give a text with something in it.")
    try:
        decoded = text.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{text.name}: no UTF-8 text at byte {error.start}; give a text file.") from None
    if "\0" in decoded:
        at = decoded.index("\0")
        raise UserError(f"{text.name}: has a zero byte at character {at}: no text; give a text file.")
    return decoded


@dataclass(frozen=True)
class _Cut:
    """Texts to samples of one model."""

    tokenizer: TokenIds
    length: int
    parse_special: bool
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, parse_special=self.parse_special)

    def running(self, ids: list[int], name: str) -> list[list[int]]:
        """One run of tokens, cut into samples."""
        length, bos = self.length, self.tokenizer.bos
        rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        if not rows:
            raise UserError(
                f"{name}: has {len(ids)} tokens, fewer than one sample of {length}; "
                "give more text, or a smaller --sequence-length."
            )
        return rows if bos is None else [[bos, *row[1:]] for row in rows]

    def row(self, row: Row) -> list[int]:
        """A text or a chat as one sample."""
        if isinstance(row.content, str):
            return self.encode(row.content)[: self.length]
        text = _chat.render(row.content, self.tokenizer, self.chat_template, row.where)
        _tables.check_unicode(text, row.where)
        if not text.strip():
            return []
        bos = "" if self.tokenizer.bos is None else self.tokenizer.text_of[self.tokenizer.bos]
        add_bos = not bos or not text.startswith(bos)
        return self.tokenizer.encode(text, parse_special=True, add_bos=add_bos)[: self.length]


def _of_table(table: Table, cut: _Cut, samples: int, seed: int | None) -> tuple[list[list[int]], str]:
    """(samples, digest of the rows they are made of). With a seed, lines give more samples than asked for."""
    if _are_lines(list(itertools.islice(_rows(table, enough=1), _HEAD))):
        wanted = samples * cut.length * (1 if seed is None else _SPREAD)
        text, ids = _running_text(_rows(table), cut, wanted)
        return cut.running(ids, table.name), hashlib.sha256(text.encode()).hexdigest()
    if seed is None:
        chosen: Iterator[Row] | list[Row] = (row for row in _rows(table) if not row.is_blank)
    else:
        chosen = _at_random(_rows(table, enough=samples), samples, seed)
    found, digest = [], hashlib.sha256()
    for row in chosen:
        if ids := cut.row(row):
            found.append(ids)
            whole = row.content
            digest.update((whole if isinstance(whole, str) else json.dumps(whole, default=str)).encode())
        if len(found) == samples:
            break
    if not found:
        raise UserError(f"{table.name}: no line or row of it has text; give some that have.")
    return found, digest.hexdigest()


def _rows(table: Table, enough: int | None = None) -> Iterator[Row]:
    """Rows of all files, or of the first ones that have `enough` together."""
    seen = 0
    for part in table.parts:
        for row in part():
            seen += not row.is_blank
            yield row
        if enough is not None and seen >= enough:
            return


def _are_lines(rows: Sequence[Row]) -> bool:
    """Whether each row is one line of a text, with its end."""
    texts = [row.content for row in rows]
    return any(texts) and all(isinstance(t, str) and (not t or t.find("\n") == len(t) - 1) for t in texts)


def _running_text(rows: Iterator[Row], cut: _Cut, wanted: int) -> tuple[str, list[int]]:
    """Lines run together, until they have `wanted` tokens, and these."""
    lines: list[str] = []
    size, enough = 0, 8 * wanted  # characters: a token has some four, in most texts
    for row in rows:
        if not isinstance(row.content, str):
            raise UserError(f"{row.where}: has messages, but the rows before it are lines of text.")
        lines.append(row.content or "\n")
        size += len(lines[-1])
        if size >= enough:
            text = "".join(lines)
            ids = cut.encode(text)
            if len(ids) >= wanted:
                return text, ids[:wanted]
            enough *= 2
    text = "".join(lines)
    return text, cut.encode(text)


def _at_random(rows: Iterator[Row], count: int, seed: int) -> list[Row]:
    """`count` rows, each as likely as any other, in their order.

    Source: Vitter 1985, Random sampling with a reservoir, algorithm R.
    """
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, Row]] = []
    for i, row in enumerate(row for row in rows if not row.is_blank):
        if i < count:
            kept.append((i, row))
        elif (j := int(rng.integers(i + 1))) < count:
            kept[j] = (i, row)
    return [row for _, row in sorted(kept, key=lambda item: item[0])]
