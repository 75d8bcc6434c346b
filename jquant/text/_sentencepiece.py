"""SentencePiece models (tokenizer.model) and llama2.c's vocabularies (tok*.bin), read without a library.

tokenizer.model is a protocol-buffer message (sentencepiece_model.proto): a run of fields, each a varint
`number << 3 | wire type`, then a varint (wire type 0), 8 bytes (1), a varint length and so many bytes (2), or
4 bytes (5). Of the top level, field 1 is a piece {1: text, 2: float32 score, 3: type}, field 2 the trainer's
settings {3: model type}, field 3 the normalizer's {3: add_dummy_prefix}.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import gguf

from jquant.core import UserError

_BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int  # gguf.TokenType; SentencePiece numbers its types alike


@dataclass(frozen=True)
class SentencePiece:
    pieces: list[Piece]
    add_dummy_prefix: bool = True  # a space before every text


def read_model(data: bytes, name: str) -> SentencePiece:
    """Parse a tokenizer.model; `name` is for errors.

    Raises UserError where the file is no SentencePiece model, or one that does not merge pairs (unigram).
    """
    try:
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (ValueError, IndexError, TypeError, struct.error):
        raise UserError(f"{name}: not a SentencePiece model, or damaged.") from None
    if not pieces:
        raise UserError(f"{name}: no tokens found; not a SentencePiece model, or damaged.")
    if trainer.get(3, 1) != _BPE:
        raise UserError(
            f"{name}: a SentencePiece model of type {trainer.get(3, 1)} (BPE is {_BPE}); llama.cpp's "
            "tokenizer for these models merges pairs and would split text differently."
        )
    return SentencePiece(pieces, bool(normalizer.get(3, 1)))


def _piece(data: object) -> Piece:
    fields = dict(_fields(data))
    text, score = fields.get(1, b""), fields.get(2, 0.0)
    if not isinstance(text, bytes) or not isinstance(score, float):
        raise TypeError
    return Piece(text.decode(), score, int(fields.get(3, gguf.TokenType.NORMAL)))


def _fields(data: object) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a message; those of 4 bytes are read as float32."""
    if not isinstance(data, bytes):
        raise TypeError
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 1:
            value, at = data[at : at + 8], at + 8
        elif wire == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif wire == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        else:
            raise ValueError
        if at > len(data):
            raise ValueError
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, lowest first; the high bit says that more follow."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def read_llama2c(data: bytes, name: str) -> SentencePiece:
    """Parse llama2.c's tokenizer.bin: int32 longest token, then per token float32 score, int32 length, bytes.

    Its exporter wrote spaces for ▁ and a line break around <s> and </s>; ids 3 to 258 are the bytes.
    """
    pieces, at = [], 4
    try:
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if length < 0 or at + length > len(data):
                raise ValueError
            text = data[at : at + length].decode()
            at += length
            pieces.append(Piece(text.replace(" ", "▁"), score, gguf.TokenType.NORMAL))
    except (ValueError, struct.error):
        raise UserError(f"{name}: not a tokenizer of llama2.c, or damaged.") from None
    special = {0: ("<unk>", gguf.TokenType.UNKNOWN), 1: ("<s>", gguf.TokenType.CONTROL)}
    special[2] = ("</s>", gguf.TokenType.CONTROL)
    for i, (text, type) in special.items():
        if len(pieces) <= i or pieces[i].text.strip() != text:
            raise UserError(f"{name}: token {i} is not {text}; not a tokenizer of llama2.c.")
        pieces[i] = Piece(text, 0.0, type)
    for byte in range(min(256, len(pieces) - 3)):
        pieces[3 + byte] = Piece(f"<0x{byte:02X}>", pieces[3 + byte].score, gguf.TokenType.BYTE)
    return SentencePiece(pieces)
