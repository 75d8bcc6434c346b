"""The tokenizer of a model folder as GGUF metadata: `tokenizer.ggml.*` and the chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import gguf
import numpy as np

from jquant.core import MetadataValue, UserError
from jquant.io.paths import AnyPath
from jquant.text import _json, _pretokenizer, _vocabulary
from jquant.text._json import Json, entries, steps, table
from jquant.text._vocabulary import ADDED_SCORE, BYTE, UNUSED, Vocabulary

ADDITIONAL_TEMPLATES = "additional_chat_templates"  # a folder of named ones
_KEYS = gguf.Keys.Tokenizer
_SPECIAL = {
    "bos": _KEYS.BOS_ID, "eos": _KEYS.EOS_ID, "eot": _KEYS.EOT_ID, "eom": _KEYS.EOM_ID, "unk": _KEYS.UNK_ID,
    "sep": _KEYS.SEP_ID, "pad": _KEYS.PAD_ID, "mask": _KEYS.MASK_ID,
}  # fmt: skip


def metadata(folder: AnyPath, config: Json, *, pre: str | None = None) -> dict[str, MetadataValue]:
    """The tokenizer of `folder`, padded to config's vocab_size. pre: a pre-tokenizer name to use as it is.

    Raises UserError where there is no tokenizer, or none that llama.cpp would apply in the same way.
    """
    if pre is not None:
        _pretokenizer.check_name(pre)
    settings = _json.read_file(folder / "tokenizer_config.json")
    vocabulary = _vocabulary.read(folder, settings, pre)
    vocabulary = _padded(vocabulary, config.get("vocab_size"))
    _check(vocabulary)
    out: dict[str, MetadataValue] = {
        _KEYS.MODEL: vocabulary.model,
        _KEYS.PRE: vocabulary.pre,
        _KEYS.LIST: vocabulary.tokens,
        _KEYS.TOKEN_TYPE: np.array(vocabulary.types, np.int32),
    }
    if vocabulary.scores is not None:
        out[_KEYS.SCORES] = np.array(vocabulary.scores, np.float32)
    if vocabulary.merges is not None:
        out[_KEYS.MERGES] = vocabulary.merges
    special = _special_ids(folder, config, settings, vocabulary.tokens)
    out |= {_SPECIAL[kind]: np.uint32(token) for kind, token in special.items()}
    out |= _added_at_ends(vocabulary, settings, special)
    if vocabulary.add_space_prefix is not None:
        out[_KEYS.ADD_PREFIX] = vocabulary.add_space_prefix
    return out | _chat_template(folder, settings)


def _padded(vocabulary: Vocabulary, vocab_size: object) -> Vocabulary:
    """Embeddings often have more rows than the tokenizer has tokens: the rest are unused tokens."""
    count = len(vocabulary.tokens)
    if not isinstance(vocab_size, int) or vocab_size == count:
        return vocabulary
    if vocab_size < count:
        raise UserError(
            f"the tokenizer has {count} tokens, but config.json says vocab_size {vocab_size}: "
            "the tokenizer files belong to another model, or tokens were added without resizing."
        )
    more = vocab_size - count
    scores = vocabulary.scores
    return replace(
        vocabulary,
        tokens=vocabulary.tokens + [f"[PAD{i}]" for i in range(count, vocab_size)],
        types=vocabulary.types + [UNUSED] * more,
        scores=None if scores is None else scores + [ADDED_SCORE] * more,
    )


def _check(vocabulary: Vocabulary) -> None:
    """Refuse what makes llama.cpp abort, rather than report: equal tokens, bytes that no token covers."""
    seen: dict[str, int] = {}
    for i, token in enumerate(vocabulary.tokens):
        if seen.setdefault(token, i) != i:
            raise UserError(
                f"the tokens {seen[token]} and {i} are both {token!r}; llama.cpp needs them unique."
            )
    if vocabulary.model == "llama" and vocabulary.types.count(BYTE) != 256:
        raise UserError(
            f"the tokenizer has {vocabulary.types.count(BYTE)} of the 256 byte tokens <0x00> … <0xFF>; "
            "llama.cpp cannot read characters outside such a vocabulary."
        )


def _special_ids(folder: AnyPath, config: Json, settings: Json, tokens: list[str]) -> dict[str, int]:
    """Ids of bos, eos, …: named by the tokenizer's files, or numbered by the model's, in that order."""
    ids = {token: i for i, token in enumerate(tokens)}
    named = (settings, _json.read_file(folder / "special_tokens_map.json"))
    numbered = (config, _json.read_file(folder / "generation_config.json"))
    found = {}
    for kind in _SPECIAL:
        for source in named:
            entry = source.get(f"{kind}_token")
            text = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(text, str) and text in ids:
                found.setdefault(kind, ids[text])
        for source in numbered:
            entry = source.get(f"{kind}_token_id")
            first = entry[0] if isinstance(entry, list) and entry else entry
            if isinstance(first, int) and first >= 0:
                if first >= len(tokens):
                    raise UserError(
                        f"{kind}_token_id is {first}, but the tokenizer has {len(tokens)} tokens."
                    )
                found.setdefault(kind, first)
    return found


def _added_at_ends(
    vocabulary: Vocabulary, settings: Json, special: Mapping[str, int]
) -> dict[str, MetadataValue]:
    """Whether bos and eos are put around a text: as settings say, else as the post-processor does it."""
    ends = _template_ends(vocabulary.added or {})
    out: dict[str, MetadataValue] = {}
    for kind, key, text in (("bos", _KEYS.ADD_BOS, ends[0]), ("eos", _KEYS.ADD_EOS, ends[1])):
        wanted = settings.get(f"add_{kind}_token")
        if isinstance(wanted, bool):
            out[key] = wanted
        elif text is not None:
            known = special.get(kind)
            if known is None or vocabulary.tokens[known] != text:
                raise UserError(
                    f"tokenizer.json puts {text!r} around every text, which is not the {kind} token; "
                    f"name it as {kind}_token in tokenizer_config.json, or llama.cpp would leave it out."
                )
            out[key] = True
        elif vocabulary.model == "gpt2":
            out[key] = False  # SentencePiece: left to llama.cpp's default, bos and no eos, which is Llama's
    return out


def _template_ends(post: Json) -> tuple[str | None, str | None]:
    """The special tokens that a post-processor puts before and after a single text."""
    for step in steps(post, "processors"):
        single = [table(part) for part in entries(step.get("single"))]
        if step.get("type") == "TemplateProcessing" and len(single) > 1:
            first, last = (table(part.get("SpecialToken")).get("id") for part in (single[0], single[-1]))
            return (
                first if isinstance(first, str) else None,
                last if isinstance(last, str) else None,
            )
    return None, None


def _chat_template(folder: AnyPath, settings: Json) -> dict[str, MetadataValue]:
    """The template, and others by name, from the first of these that there is, as transformers reads them:
    chat_template.jinja; `chat_template` of tokenizer_config.json, one text or a list of named ones;
    chat_template.json. Those of additional_chat_templates/NAME.jinja have names."""
    path = folder / "chat_template.jinja"
    template = settings.get("chat_template")
    if path.is_file():
        template = _json.read_text(path)
    elif template is None:
        template = _json.read_file(folder / "chat_template.json").get("chat_template")
    choices = [{"name": "default", "template": template}] if isinstance(template, str) else entries(template)
    more = sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))
    choices = [*choices, *({"name": file.stem, "template": _json.read_text(file)} for file in more)]
    out: dict[str, MetadataValue] = {}
    names = []
    for choice in map(table, choices):
        name, text = re.sub(r"[^A-Za-z0-9]", "_", str(choice.get("name", ""))), choice.get("template")
        if name == "default" and isinstance(text, str):
            out[_KEYS.CHAT_TEMPLATE] = text
        elif name and isinstance(text, str):
            out[_KEYS.CHAT_TEMPLATE_N.format(name=name)] = text
            names.append(name)
    return out | ({_KEYS.CHAT_TEMPLATES: names} if names else {})
