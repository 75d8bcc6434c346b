"""Text to calibrate on, as samples of tokens: a plain text file, JSON lines, or texts that need no file.

A plain text is one run of tokens, cut into consecutive samples of the sequence length; where the model wants
a BOS, it takes the place of each sample's first token. So does llama-imatrix. A line of a JSON-lines file is
one sample, {"text": …} or {"messages": [{"role": …, "content": …}, …]}, cut at the sequence length.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jquant.core import UserError

from . import hub
from .token_ids import TokenIds

WIKITEXT2, PYDOC = "wikitext2", "pydoc"
FEWEST, MOST = 128, 1024  # samples between which more or fewer are not worth a remark


@dataclass(frozen=True)
class Samples:
    """tokens: [samples, sequence length], padded with 0 behind `lengths` tokens."""

    tokens: Int32[np.ndarray, "s t"]
    lengths: Int32[np.ndarray, " s"]
    dataset: str  # name, for people
    digest: str  # SHA-256 of the text
    remarks: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Text:
    name: str
    data: bytes
    remarks: tuple[str, ...] = ()


def read_text(calibration: str | None) -> Text:
    """A file, "wikitext2" (from the hub), "pydoc" (Python's manual pages), or None: the first that is there.

    Raises UserError where the file cannot be read or the hub does not answer.
    """
    if calibration == PYDOC:
        return Text(PYDOC, _pydoc())
    if calibration == WIKITEXT2:
        return Text("wikitext-2-raw/wiki.train.raw", _wikitext2())
    if calibration is None:
        try:
            return read_text(WIKITEXT2)
        except UserError as error:
            remark = f"{error} Calibrating on Python's manual pages; --calibration FILE is better."
            return Text(PYDOC, _pydoc(), (remark,))
    path = Path(calibration)
    try:
        return Text(path.name, path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give a file, {WIKITEXT2} or {PYDOC}."
        ) from None


def _pydoc() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()


def _wikitext2() -> bytes:
    """The training part, unprocessed, from the archive that llama.cpp's own scripts use."""
    archive = hub.dataset_file("ggml-org/ci", "wikitext-2-raw-v1.zip")
    with zipfile.ZipFile(archive) as files:
        return files.read("wikitext-2-raw/wiki.train.raw")


def sample(
    text: Text,
    tokenizer: TokenIds,
    *,
    samples: int,
    sequence_length: int,
    seed: int | None = None,
    parse_special: bool = False,
    chat_template: str | None = None,
) -> Samples:
    """At most `samples` samples: the first ones, or with a seed ones chosen at random.

    chat_template: Jinja, for lines with messages. Raises UserError where the text is empty, no text, too
    short, or a line of it is wrong.
    """
    decoded = _decode(text)
    lines = text.name.endswith((".jsonl", ".ndjson"))
    if lines:
        rows = list(_lines(text.name, decoded, tokenizer, sequence_length, parse_special, chat_template))
    else:
        ids = tokenizer.encode(decoded, parse_special=parse_special)
        rows = [
            ids[i : i + sequence_length] for i in range(0, len(ids) - sequence_length + 1, sequence_length)
        ]
        if tokenizer.bos is not None:
            rows = [[tokenizer.bos, *row[1:]] for row in rows]
        if not rows:
            raise UserError(
                f"{text.name}: has {len(ids)} tokens, fewer than one sample of {sequence_length}; "
                "give more text, or a smaller --sequence-length."
            )
    if not rows:
        raise UserError(f"{text.name}: no line of it has text; give lines with some.")
    remarks = list(text.remarks)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(rows))[:samples]
        rows = [rows[i] for i in np.sort(order)]
    if len(rows) < samples:
        remarks.append(f"{text.name} has {len(rows)} samples of {sequence_length} tokens, not {samples}.")
    rows = rows[:samples]
    if not FEWEST <= len(rows) <= MOST:
        remarks.append(f"{len(rows)} samples; {FEWEST} to {MOST} are usual.")
    tokens = np.zeros((len(rows), sequence_length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    return Samples(tokens, lengths, text.name, hashlib.sha256(text.data).hexdigest(), tuple(remarks))


def _decode(text: Text) -> str:
    if not text.data.strip():
        raise UserError(f"{text.name}: is empty; give a text to calibrate on.")
    try:
        decoded = text.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{text.name}: no UTF-8 text at byte {error.start}; give a text file.") from None
    if "\0" in decoded:
        at = decoded.index("\0")
        raise UserError(f"{text.name}: has a zero byte at character {at}: no text; give a text file.")
    return decoded


def _lines(
    name: str, text: str, tokenizer: TokenIds, length: int, parse_special: bool, chat_template: str | None
) -> Iterator[list[int]]:
    for number, line in enumerate(io.StringIO(text), 1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: is not JSON ({error}).") from None
        if not isinstance(entry, Mapping) or not ({"text", "messages"} & entry.keys()):
            raise UserError(f'{where}: expected {{"text": …}} or {{"messages": […]}}.')
        chat = "messages" in entry
        content = _render(entry["messages"], tokenizer, chat_template, where) if chat else entry["text"]
        if not isinstance(content, str):
            raise UserError(f"{where}: 'text' is {type(content).__name__}, not text.")
        _check_unicode(content, where)
        if not content.strip():
            continue
        if chat:
            bos = "" if tokenizer.bos is None else tokenizer.text_of[tokenizer.bos]
            add_bos = not bos or not content.startswith(bos)
            ids = tokenizer.encode(content, parse_special=True, add_bos=add_bos)
        else:
            ids = tokenizer.encode(content, parse_special=parse_special)
        if ids:
            yield ids[:length]


def _check_unicode(content: str, where: str) -> None:
    """JSON can escape one half of a surrogate pair, which no tokenizer can take."""
    try:
        content.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(content[error.start]):04x}"
        raise UserError(
            f"{where}: has {half} at character {error.start} without its other half, which is no text; mend "
            "or delete the line."
        ) from None


def _render(messages: object, tokenizer: TokenIds, template: str | None, where: str) -> str:
    """Messages as the model was trained to see them."""
    if template is None:
        raise UserError(f"{where}: has messages, but the model has no chat template; give lines of text.")
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in messages
    ):
        raise UserError(f'{where}: \'messages\' must be a list of {{"role": …, "content": …}}.')
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    special = {
        f"{kind}_token": "" if token is None else tokenizer.text_of[token]
        for kind, token in (("bos", tokenizer.bos), ("eos", tokenizer.eos))
    }
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=False, **special)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses it: {error}.") from None
    except Exception as error:  # a template is a program, made for messages of another form
        raise UserError(
            f"{where}: the model's chat template fails on it ({type(error).__name__}: {error}); give every "
            "message a text as its content, or delete the line."
        ) from None
