"""The name that llama.cpp gives to a BPE tokenizer's way of splitting text, from the tokenizer's own rules.

Before byte pairs are merged, a text is split by regular expressions, one after the other; merges never cross
a split. llama.cpp has these expressions built in, by name. tokenizer.json spells them out, so the name is a
matter of looking them up; a wrong name gives a model that reads other tokens than it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jquant.core import UserError

Json = Mapping[str, object]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _SUFFIXES + "|" + _WORD + r"|\p{N}{1,3}" + _REST
QWEN2 = _SUFFIXES + "|" + _WORD + r"|\p{N}" + _REST
QWEN35 = (
    _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = _CASED % ("", "", "")
GPT4O = _CASED % (f"{_SUFFIXES}?", f"{_SUFFIXES}?", "{1,3}")
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

# The expressions, and whether a word that is a token is taken whole (`ignore_merges`), which llama.cpp
# ties to the name. None: that makes no difference.
_NAMES: Mapping[tuple[tuple[str, ...], bool | None], str] = {
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((TEKKEN,), None): "tekken",
    ((GPT4O,), False): "gpt-4o",
    ((r"\p{N}{1,3}", LLAMA3.replace("{1,3}", "+")), True): "minicpm5",
    ((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3), False): "deepseek-v3",
    (
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
        False,
    ): "deepseek-coder",
}

_NO_STEPS = {"type": "Sequence", "normalizers": []}  # DeepSeek's tokenizers have it

# Other names of the same rules.
_SAME = {"deepseek-r1-qwen": "qwen2"} | dict.fromkeys(
    ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"), "llama-bpe"
)
_ADD_BOS = ("llama-bpe", "tekken")  # where the header does not say

# What llama.cpp accepts as tokenizer.ggml.pre (llama-vocab.cpp, llama_vocab::impl::load).
# fmt: off
KNOWN = frozenset({
    "a.x-4.0", "afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "chatglm-bpe", "codeshell",
    "cohere2moe", "command-r", "dbrx", "deepseek-coder", "deepseek-llm", "deepseek-r1-qwen",
    "deepseek-v3", "default", "exaone", "exaone-moe", "exaone4", "f2llmv2", "falcon", "falcon-h1",
    "falcon3", "gemma4", "gigachat", "glm4", "glm5", "gpt-2", "gpt-4o", "gpt3-finnish",
    "granite-docling", "granite-embed-multi-311m", "granite-embed-multi-97m", "grok-2", "hunyuan",
    "hunyuan-dense", "hy_v4", "jais", "jais-2", "jina-de", "jina-es", "jina-v1-en", "jina-v2-code",
    "jina-v2-de", "jina-v2-es", "jina-v5-nano", "joyai-llm", "kanana2", "kimi-k2", "kormo", "laguna",
    "lfm2", "llada-moe", "llama-bpe", "llama-v3", "llama3", "llama4", "megrez", "mellum", "mellum2",
    "midm-2.0", "minerva-7b", "minicpm5", "minimax-m2", "modern-bert", "mpt", "olmo", "phi-2",
    "pixtral", "poro-chat", "qwen2", "qwen35", "refact", "roberta-bpe", "sarvam-moe", "seed-coder",
    "smaug-bpe", "smollm", "solar-open", "spark2_5", "stablelm2", "starcoder", "superbpe", "talkie",
    "tekken", "tiny_aya", "trillion", "ufakzeka", "viking", "whitespace", "youtu",
})
# fmt: on


def recognise(tokenizer: Json) -> str:
    """The name for a byte-level BPE tokenizer.json.

    Raises UserError, with what was found, where no name is known to split and merge in the same way.
    """
    normalizer, model = _table(tokenizer.get("normalizer")), _table(tokenizer.get("model"))
    splits = tuple(_expressions(_table(tokenizer.get("pre_tokenizer"))))
    whole = bool(model.get("ignore_merges"))
    # llama.cpp leaves out Qwen2's NFC: only text in decomposed letters is read differently.
    if normalizer.get("type") in (None, "NFC") or normalizer == _NO_STEPS:
        for key in ((splits, whole), (splits, None)):
            if key in _NAMES:
                return _NAMES[key]
    found = f"splits {list(splits)}, ignore_merges {whole}, normalizer {normalizer.get('type')}"
    raise UserError(f"tokenizer.json: unknown pre-tokenizer ({found}). {_remedy()}")


class Rules(NamedTuple):
    """How text is split before merging, and whether a word that is a token is taken whole."""

    splits: tuple[str, ...]
    whole_words: bool
    adds_bos: bool  # where the header does not say


def rules(name: str) -> Rules:
    """What a name stands for; raises UserError where that is not known here."""
    name = _SAME.get(name, name)
    for (splits, whole), known in _NAMES.items():
        if known == name:
            return Rules(splits, whole is not False, known in _ADD_BOS)
    raise UserError(
        f"tokenizer.ggml.pre is {name!r}, whose way of splitting text is not known; known: "
        f"{', '.join(sorted({*_NAMES.values(), *_SAME}))}. Use llama-imatrix for this model."
    )


def check_name(name: str) -> str:
    """A name that the user gave; raises UserError where llama.cpp knows none such."""
    if name not in KNOWN:
        raise UserError(f"unknown pre-tokenizer {name!r}. {_remedy()}")
    return name


def _remedy() -> str:
    return f"Name the right one with --pre-tokenizer NAME; llama.cpp knows {', '.join(sorted(KNOWN))}."


def _expressions(step: Json) -> list[str]:
    """The regular expressions that a pre-tokenizer applies; one it cannot express becomes "<type …>"."""
    kind = step.get("type")
    if kind == "Sequence":
        inner = step.get("pretokenizers")
        return [e for part in inner for e in _expressions(_table(part))] if isinstance(inner, list) else []
    if kind == "ByteLevel":
        prefix = ["<ByteLevel add_prefix_space>"] if step.get("add_prefix_space") else []
        return prefix + ([GPT2] if step.get("use_regex", True) else [])
    if kind == "Digits":
        return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
    if kind == "Split":
        behavior, invert = step.get("behavior"), bool(step.get("invert"))
        expression = _table(step.get("pattern")).get("Regex")
        if isinstance(expression, str) and (behavior, invert) in (("Isolated", False), ("Removed", True)):
            return [expression.replace("\r", r"\r").replace("\n", r"\n")]
    return [f"<{kind} { ({k: v for k, v in step.items() if k != 'type'}) }>"] if kind else []


def _table(value: object) -> Json:
    return value if isinstance(value, Mapping) else {}
