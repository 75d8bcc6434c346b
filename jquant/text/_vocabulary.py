"""The tokens of a model folder, in the two kinds that llama.cpp knows.

*gpt2*: byte-level BPE, merges in order, text first split by rules that have a name (Llama 3, Qwen, SmolLM).
*llama*: SentencePiece BPE, pairs merged by the score of the token they make, with tokens for single bytes to
fall back on (Llama 2, Mistral). The first is read from tokenizer.json, the second from tokenizer.model, from
a tokenizer.json of that form, or from llama2.c's tok*.bin.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import gguf

from jquant.core import UserError
from jquant.io.paths import AnyPath
from jquant.text import _json, _pretokenizer, _sentencepiece
from jquant.text._json import Json, entries, steps, table

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    int(gguf.TokenType[name]) for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
)
ADDED_SCORE = -1000.0  # tokens outside the merges; llama.cpp finds them before it merges
_MAX_TOKENS = 1 << 24  # far above any model: a damaged number must not fill the memory
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<pad>|<mask>|<unused.*>", re.DOTALL)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, with what each kind of tokenizer needs beside them."""

    model: str  # "gpt2" or "llama"
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None  # llama
    merges: list[str] | None = None  # gpt2
    add_space_prefix: bool | None = None
    added: Mapping[str, object] | None = None  # tokenizer.json's post-processor


def read(folder: AnyPath, settings: Json, pre: str | None) -> Vocabulary:
    """The folder's tokenizer, from the file that states it most exactly."""
    tokenizer = _json.read_file(folder / "tokenizer.json")
    byte_level = bool(tokenizer) and not _has_byte_fallback(tokenizer)
    if byte_level and table(tokenizer.get("model")).get("type") == "BPE":
        return _byte_level_bpe(tokenizer, pre or _pretokenizer.recognise(tokenizer))
    if pre not in (None, "default"):
        raise UserError(
            f"--pre-tokenizer {pre}: this model's tokenizer is SentencePiece, which splits text by no rules; "
            "leave the option out."
        )
    model = folder / "tokenizer.model"
    if model.is_file():
        parsed = _sentencepiece.read_model(model.read_bytes(), model.name)
        return _from_pieces(parsed, settings, tokenizer, _json.read_file(folder / "added_tokens.json"))
    if tokenizer:
        return _sentencepiece_bpe(tokenizer)
    for path in sorted(folder.glob("tok*.bin")):
        return _from_pieces(_sentencepiece.read_llama2c(path.read_bytes(), path.name), settings, {}, {})
    raise UserError(
        f"{folder}: no tokenizer found; expected tokenizer.json, tokenizer.model or llama2.c's tok*.bin."
    )


def _has_byte_fallback(tokenizer: Json) -> bool:
    return bool(table(tokenizer.get("model")).get("byte_fallback"))


def _byte_level_bpe(tokenizer: Json, pre: str) -> Vocabulary:
    tokens, types = _tokens_of_json(tokenizer)
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(tokenizer)]
    post = table(tokenizer.get("post_processor"))
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, added=post)


def _sentencepiece_bpe(tokenizer: Json) -> Vocabulary:
    """SentencePiece BPE as tokenizer.json holds it: the merges, sorted by the score of what they make."""
    model = table(tokenizer.get("model"))
    if model.get("type") != "BPE":
        raise UserError(
            f"tokenizer.json: a tokenizer of type {model.get('type')!r}; only BPE can be converted."
        )
    tokens, types = _tokens_of_json(tokenizer)
    ids = {token: i for i, token in enumerate(tokens)}
    scores = [ADDED_SCORE if type != NORMAL else -1e6 for type in types]
    for rank, pair in reversed(list(enumerate(_merges(tokenizer)))):
        made = ids.get("".join(pair))
        if made is not None:
            scores[made] = -float(rank)
    for i, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = BYTE
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in ids:
        types[ids[unknown]] = UNKNOWN
    post = table(tokenizer.get("post_processor"))
    return Vocabulary("llama", "default", tokens, types, scores, None, _prepends_space(tokenizer), post)


def _from_pieces(
    parsed: _sentencepiece.SentencePiece, settings: Json, tokenizer: Json, added: Json
) -> Vocabulary:
    """A SentencePiece model and what transformers adds to it: added_tokens.json, `added_tokens_decoder`."""
    tokens = [piece.text for piece in parsed.pieces]
    types = [piece.type for piece in parsed.pieces]
    tokens = [
        t.replace("▁", " ") if type == USER_DEFINED else t for t, type in zip(tokens, types, strict=True)
    ]
    scores = [piece.score for piece in parsed.pieces]
    extra = {_id(i): {"content": text} for text, i in added.items()}
    extra |= {_id(t.get("id")): t for t in map(table, entries(tokenizer.get("added_tokens")))}
    decoder = table(settings.get("added_tokens_decoder"))
    extra |= {_id(i): table(token) for i, token in decoder.items()}
    for i, token in sorted(extra.items()):
        text = str(token.get("content", ""))
        if i < len(parsed.pieces) and tokens[i] == text:
            types[i] = _added_type(token) if types[i] == NORMAL else types[i]
            continue
        while len(tokens) <= i:
            tokens.append(f"[PAD{len(tokens)}]")
            types.append(UNUSED)
            scores.append(ADDED_SCORE)
        types[i] = _added_type(token)
        tokens[i] = text if types[i] == CONTROL else text.replace("▁", " ")
        scores[i] = ADDED_SCORE
    wanted = settings.get("add_prefix_space")
    prefix = wanted if isinstance(wanted, bool) else parsed.add_dummy_prefix
    post = table(tokenizer.get("post_processor"))
    return Vocabulary("llama", "default", tokens, types, scores, None, prefix, post)


def _tokens_of_json(tokenizer: Json) -> tuple[list[str], list[int]]:
    """Texts and types by id; an id that nothing claims becomes an unused token."""
    by_id = {_id(i): text for text, i in table(table(tokenizer.get("model")).get("vocab")).items()}
    types = dict.fromkeys(by_id, NORMAL)
    for token in map(table, entries(tokenizer.get("added_tokens"))):
        i, text = _id(token.get("id")), str(token.get("content", ""))
        types[i] = _added_type(token)
        by_id[i] = text if types[i] == CONTROL else text.replace("▁", " ")
    if not by_id:
        raise UserError("tokenizer.json: the vocabulary is empty; the file may be damaged.")
    count = max(by_id) + 1
    return (
        [str(by_id.get(i, f"[PAD{i}]")) for i in range(count)],
        [types.get(i, UNUSED) for i in range(count)],
    )


def _added_type(token: Json) -> int:
    """Some models do not mark their control tokens as special; their look gives them away."""
    special = token.get("special") or _LOOKS_SPECIAL.fullmatch(str(token.get("content", "")))
    return CONTROL if special else USER_DEFINED


def _merges(tokenizer: Json) -> Iterable[tuple[str, str]]:
    """Pairs in order of priority; old files write "a b", newer ones ["a", "b"]."""
    for merge in entries(table(tokenizer.get("model")).get("merges")):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"tokenizer.json: merge {merge!r} is not a pair of tokens.")
        yield str(pair[0]), str(pair[1])


def _prepends_space(tokenizer: Json) -> bool:
    """Whether a text starts with ▁; refuses a normalizer or split that llama.cpp would not reproduce."""
    prefix, spaces = False, True  # whether a space is left for those behind to see
    normalizing = steps(tokenizer.get("normalizer"), "normalizers")
    splitting = steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    for step in [*normalizing, *splitting]:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == "▁":
            spaces = False  # llama.cpp's tokenizer does this of its own accord
        elif kind == "Split" and step.get("pattern") == {"String": " "} and not spaces:
            pass  # Gemma: there is nothing to split at
        elif kind == "Metaspace" and step.get("split") is False:
            prefix = step.get("prepend_scheme") in ("always", "first")
        else:
            raise UserError(
                f"tokenizer.json: step {dict(step)} is unknown for a SentencePiece tokenizer; llama.cpp "
                "would split text differently. A tokenizer.model beside it is read in preference."
            )
    return prefix


def _id(value: object) -> int:
    """A token's number; JSON tables have it as text."""
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if not 0 <= number < _MAX_TOKENS:
        raise UserError(f"the tokenizer's files have a token numbered {value!r}; they may be damaged.")
    return number
