"""Text as token ids, by the tokenizer that GGUF metadata describes: what llama.cpp's tokenize gives.

Two kinds, as in `_vocabulary`. *gpt2*: text is split by the rules that `tokenizer.ggml.pre` names, then bytes
are merged in the order of the merges. *llama*: spaces become ▁, and neighbours are merged, the pair first
whose token has the highest score, the leftmost of equals; what is no token in the end is written in bytes.

Source: llama.cpp, llama-vocab.cpp (llama_vocab::impl::tokenize, llm_tokenizer_spm_session).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from jquant.core import Metadata, UserError
from jquant.text import _pretokenizer
from jquant.text._vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED

_SPACE = "▁"
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_GGUF_NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # gguf-py's spelling


@dataclass(frozen=True)
class TokenIds:
    """encode(text) of one model."""

    bos: int | None  # put before every text
    eos: int | None
    special_texts: dict[str, str] = field(repr=False)  # "bos" → "<s>", of those that the model has
    text_of: list[str] = field(repr=False)  # token → its text
    _special: list[tuple[str, int, bool]] = field(repr=False)  # text, id, only when asked for; longest first
    _encode: Callable[[str, bool], list[int]] = field(
        repr=False
    )  # text, whether a special one or nothing is before it

    def encode(self, text: str, *, parse_special: bool = False, add_bos: bool = True) -> list[int]:
        """Token ids. parse_special: the texts of control tokens, such as "<|im_start|>", become them."""
        pieces: list[str | int] = [text] if text else []
        for special, token, control in self._special:
            if not control or parse_special:
                pieces = [part for piece in pieces for part in _split(piece, special, token)]
        ids = [self.bos] if add_bos and self.bos is not None else []
        begins = True
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encode(piece, begins)
            begins = isinstance(piece, int)
        return ids


def _split(piece: str | int, special: str, token: int) -> list[str | int]:
    if isinstance(piece, int) or special not in piece:
        return [piece]
    out: list[str | int] = []
    for i, part in enumerate(piece.split(special)):
        out += ([token] if i else []) + ([part] if part else [])
    return out


def from_metadata(metadata: Metadata) -> TokenIds:
    """The tokenizer of a model. Raises UserError where there is none, or of a kind that is not known here."""
    kind, pre = str(metadata.get("tokenizer.ggml.model", "")), str(metadata.get("tokenizer.ggml.pre", ""))
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError("the model's header has no tokenizer; give a model that has one.")
    types = _array(metadata, "tokenizer.ggml.token_type", len(tokens), 1)
    if kind == "gpt2":
        encode = _byte_level(metadata, tokens, pre)
    elif kind == "llama":
        scores = _array(metadata, "tokenizer.ggml.scores", len(tokens), 0)
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        encode = _sentencepiece(tokens, scores, types, prefix, _id(metadata, "unknown"))
    else:
        raise UserError(
            f"tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE) "
            "can be read. Use llama-imatrix for this model."
        )
    special = [
        (text, i, types[i] != USER_DEFINED)
        for i, text in enumerate(tokens)
        if types[i] in (CONTROL, UNKNOWN, USER_DEFINED) and text
    ]
    special.sort(key=lambda entry: -len(entry[0].encode("utf-8", "surrogateescape")))
    by_default = kind == "llama" or _pretokenizer.rules(pre).adds_bos
    adds = metadata.get("tokenizer.ggml.add_bos_token", by_default)
    named = {kind: _id(metadata, _GGUF_NAMES.get(kind, kind)) for kind in _SPECIAL}
    texts = {kind: tokens[i] for kind, i in named.items() if i is not None and i < len(tokens)}
    return TokenIds(
        named["bos"] if adds else None, named["eos"], {"bos": "", "eos": "", **texts}, tokens, special, encode
    )


def _id(metadata: Metadata, kind: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return int(value) if isinstance(value, np.integer) else None


def _array(metadata: Metadata, key: str, count: int, default: int) -> list:
    value = metadata.get(key)
    if not isinstance(value, np.ndarray):
        return [default] * count
    if len(value) != count:
        raise UserError(f"{key} has {len(value)} entries for {count} tokens; the file is damaged.")
    return value.tolist()


def _byte_level(metadata: Metadata, tokens: list[str], pre: str) -> Callable[[str, bool], list[int]]:
    rules = _pretokenizer.rules(pre)
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise UserError("tokenizer.ggml.merges is missing; the model's header is damaged.")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    # Old vocabularies have halves of characters, which no text has.
    whole = [(text, i) for i, text in enumerate(tokens) if not _SURROGATE.search(text)]
    vocabulary = dict(reversed(whole))
    # A merge of tokens that are not in the vocabulary could never be applied, and is refused by the library.
    pairs = [(a, b) for a, b in pairs if a in vocabulary and b in vocabulary and a + b in vocabulary]
    model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=rules.whole_words)
    tokenizer = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    return lambda text, begins: tokenizer.encode(text, add_special_tokens=False).ids


def _sentencepiece(
    tokens: list[str], scores: list[float], types: list[int], prefix: bool, unknown: int | None
) -> Callable[[str, bool], list[int]]:
    ids = {text: i for i, text in reversed(list(enumerate(tokens)))}
    bytes_ = {int(text[1:-1], 16): i for i, text in enumerate(tokens) if types[i] == BYTE}
    # Merges cannot cross the start of a word unless some token does, and words come again and again.
    crossing = any(re.search(f"[^{_SPACE}]{_SPACE}", text) for text in tokens)
    words = re.compile(".+" if crossing else f"{_SPACE}+[^{_SPACE}]*|[^{_SPACE}]+", re.DOTALL)

    @lru_cache(maxsize=1 << 16)
    def word(text: str) -> tuple[int, ...]:
        return tuple(_merge(text, ids, scores, bytes_, unknown))

    def encode(text: str, begins: bool) -> list[int]:
        text = (" " if prefix and begins else "") + text
        return [i for part in words.findall(text.replace(" ", _SPACE)) for i in word(part)]

    return encode


def _merge(
    text: str, ids: dict[str, int], scores: list[float], bytes_: dict[int, int], unknown: int | None
) -> list[int]:
    """Merge neighbours, best score first, until no pair makes a token.

    What is no token then is written in bytes, or where these are no tokens either, as the unknown one.
    """
    symbols = list(text)
    before, after = list(range(-1, len(text) - 1)), [*range(1, len(text)), -1]
    queue: list[tuple[float, int, int, str]] = []

    def add(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            made = symbols[left] + symbols[right]
            if made in ids:
                heapq.heappush(queue, (-scores[ids[made]], left, right, made))

    for right in range(1, len(text)):
        add(right - 1, right)
    while queue:
        _, left, right, made = heapq.heappop(queue)
        # Either may have been merged since; then their texts no longer make up what was found.
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != made:
            continue
        symbols[left], symbols[right] = made, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        add(before[left], left)
        add(left, after[left])
    out: list[int] = []
    for symbol in filter(None, symbols):
        if symbol in ids:
            out.append(ids[symbol])
        else:
            spelled = symbol.encode("utf-8", "surrogateescape")
            if bytes_.keys() >= set(spelled):
                out += [bytes_[byte] for byte in spelled]
            elif unknown is not None:
                out.append(unknown)
            else:
                raise UserError(
                    f"the model's tokenizer has no token for {symbol!r}: none of its bytes, and "
                    "tokenizer.ggml.unknown_token_id is missing; leave such characters out of the text."
                )
    return out
