"""Calibration text: cut as llama-imatrix cuts it, and bad data refused with its place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.converted import convert
from helpers.tiny_models import CHAT, LINES, write_tiny

from jquant.core import UserError
from jquant.io import GgufSource
from jquant.text import samples
from jquant.text.samples import Text, read_text, read_texts, sample
from jquant.text.token_ids import TokenIds, from_metadata


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TokenIds:
    """SentencePiece, with BOS before every text."""
    folder = tmp_path_factory.mktemp("model")
    path = convert(write_tiny(folder / "hf", "MistralForCausalLM"), folder / "out.gguf")
    return from_metadata(GgufSource(path).metadata)


TEXT = " ".join(LINES * 4)


def test_a_text_is_cut_into_consecutive_samples_that_begin_with_bos(tokenizer):
    ids = tokenizer.encode(TEXT)
    found = sample(Text("a.txt", TEXT.encode()), tokenizer, samples=3, sequence_length=50)
    assert found.tokens.shape == (3, 50)
    np.testing.assert_array_equal(found.lengths, 50)
    for i, row in enumerate(found.tokens):
        np.testing.assert_array_equal(row, [tokenizer.bos, *ids[i * 50 + 1 : (i + 1) * 50]])
    assert found.digest == hashlib.sha256(TEXT.encode()).hexdigest()
    assert found.remarks == ("3 samples; 128 to 1024 are usual.",)


def test_fewer_samples_than_asked_for_are_remarked_on(tokenizer):
    whole = len(tokenizer.encode(TEXT)) // 50
    found = sample(Text("a.txt", TEXT.encode()), tokenizer, samples=512, sequence_length=50)
    assert len(found.tokens) == whole
    assert found.remarks[0] == f"a.txt has {whole} samples of 50 tokens, not 512."


def test_a_seed_chooses_samples_and_the_same_ones_again(tokenizer):
    text = Text("a.txt", TEXT.encode())
    first, again, other = (
        sample(text, tokenizer, samples=4, sequence_length=30, seed=s).tokens for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    everything = sample(text, tokenizer, samples=512, sequence_length=30).tokens
    assert {row.tobytes() for row in first} <= {row.tobytes() for row in everything}


def jsonl(*lines: object) -> Text:
    return Text("data.jsonl", "\n".join(json.dumps(line) for line in lines).encode())


def test_a_line_of_json_is_a_sample(tokenizer):
    text = jsonl({"text": "Hello world"}, {"text": TEXT, "source": "x"})
    found = sample(text, tokenizer, samples=8, sequence_length=40)
    short = tokenizer.encode("Hello world")
    np.testing.assert_array_equal(found.lengths, [len(short), 40])
    np.testing.assert_array_equal(found.tokens[0, : len(short)], short)
    np.testing.assert_array_equal(found.tokens[0, len(short) :], 0)
    np.testing.assert_array_equal(found.tokens[1], tokenizer.encode(TEXT)[:40])


def test_messages_go_through_the_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = jsonl({"messages": messages})
    found = sample(text, tokenizer, samples=1, sequence_length=80, chat_template="{{ bos_token }}" + CHAT)
    rendered = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    wanted = tokenizer.encode(rendered, parse_special=True, add_bos=False)
    assert wanted[:1] == [tokenizer.bos]
    assert found.tokens[0, : found.lengths[0]].tolist() == wanted


BAD = {
    "empty": (Text("a.txt", b" \n "), "a.txt: is empty"),
    "binary": (Text("a.bin", b"\x80\x81\xff" * 30), "no UTF-8 text at byte 0"),
    "zeros": (Text("a.bin", b"text\0text"), "zero byte at character 4"),
    "short": (Text("a.txt", b"Hello"), r"has \d tokens, fewer than one sample of 50"),
    "not json": (Text("a.jsonl", b'{"text": "a"}\n' * 36 + b"{oops"), "a.jsonl, line 37: is not JSON"),
    "no text": (jsonl({"text": "a"}, {"body": "b"}), "line 2: expected"),
    "a list": (jsonl([1]), "line 1: expected"),
    "a number": (jsonl({"text": 3}), "line 1: 'text' is int"),
    "messages of strings": (jsonl({"messages": ["hi"]}), "line 1: 'messages' must be a list"),
    "half a pair": (jsonl({"text": "a"}, {"text": "b\ud83d"}), r"line 2: has \\ud83d at character 1"),
    "no text at all": (jsonl({"text": ""}, {"text": " "}), "data.jsonl: no line or row of it has text"),
    "refused": (jsonl({"messages": [{"role": "tool", "content": 1}]}), "refuses it: no"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_refused_with_its_place(text, message, tokenizer):
    template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=message):
        sample(text, tokenizer, samples=4, sequence_length=50, chat_template=template)


def test_lines_without_text_are_no_samples(tokenizer):
    text = jsonl({"text": ""}, {"text": "Hello"}, {"text": " \n"}, {"text": "world"})
    found = sample(text, tokenizer, samples=2, sequence_length=9)
    assert (
        found.tokens.tolist()
        == sample(
            jsonl({"text": "Hello"}, {"text": "world"}), tokenizer, samples=2, sequence_length=9
        ).tokens.tolist()
    )


def test_a_message_that_the_template_cannot_take_is_named_by_its_line(tokenizer):
    good = {"role": "user", "content": "Hi"}
    text = jsonl({"messages": [good]}, {"messages": [good, {"role": "assistant", "content": None}]})
    template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"line 2: .* template fails on it \(TypeError"):
        sample(text, tokenizer, samples=2, sequence_length=9, chat_template=template)


def test_messages_need_a_chat_template(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        sample(jsonl({"messages": []}), tokenizer, samples=1, sequence_length=9)


def test_several_texts_share_the_samples_in_turns(tokenizer):
    texts = [Text(name, f"{name} said so. ".encode() * 400) for name in ("Ada", "Bob", "Cleo")]
    alone = [sample(text, tokenizer, samples=9, sequence_length=20) for text in texts]
    mixed = sample(texts, tokenizer, samples=8, sequence_length=20)
    rows = mixed.tokens.tolist()
    whose = [[i for i, one in enumerate(alone) if row in one.tokens.tolist()] for row in rows]
    assert sorted(whose) == [[0]] * 3 + [[1]] * 3 + [[2]] * 2  # the remainder is the first ones'
    assert all(len({i for [i] in whose[start : start + 3]}) >= 2 for start in range(6))
    for i, one in enumerate(alone):
        ours = [row for row, [who] in zip(rows, whose, strict=True) if who == i]
        assert ours == one.tokens.tolist()[: len(ours)]
    assert mixed.dataset == "Ada + Bob + Cleo"
    assert mixed.digest not in [one.digest for one in alone]
    assert mixed.remarks == ("8 samples; 128 to 1024 are usual.",)


def test_a_short_text_of_several_is_remarked(tokenizer):
    texts = [Text("long", b"one two three " * 400), Text("short", b"four five six " * 12)]
    found = sample(texts, tokenizer, samples=40, sequence_length=20)
    assert any(remark.startswith("short has ") for remark in found.remarks)
    assert 20 < len(found.tokens) < 40


def test_source_code_is_of_many_modules(tmp_path, monkeypatch):
    found = read_text("python")
    assert isinstance(found, Text)
    assert found.data.count(b"\ndef ") > 50
    assert len(found.data) > 200_000
    monkeypatch.setattr(samples, "wikitext2", lambda part: Text(part, b"prose"))
    assert read_texts(None) == [Text("train", b"prose"), found]
    assert read_texts(["pydoc"]) == read_texts("pydoc") == [read_text("pydoc")]
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert read_texts(None) == [Text("train", b"prose")]
    with pytest.raises(UserError, match="no source code of its library"):
        read_text("python")


def test_without_a_connection_the_default_is_pythons_manual(monkeypatch):
    def offline(*args):
        raise UserError("no hub.")

    monkeypatch.setattr(samples.hub, "dataset_file", offline)
    found = read_text(None)
    assert found.name == "pydoc"
    assert found.data == read_text("pydoc").data
    assert len(found.data) > 100_000
    assert found.remarks == ("no hub. Calibrating on Python's manual pages; --calibration FILE is better.",)
    with pytest.raises(UserError, match="no hub"):
        read_text("wikitext2")
    with pytest.raises(UserError, match=r"absent\.txt: cannot be read: No such file"):
        read_text("absent.txt")


def test_wikitext_is_read_from_the_archive_on_the_hub(monkeypatch, tmp_path):
    import zipfile

    archive = tmp_path / "wikitext-2-raw-v1.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("wikitext-2-raw/wiki.train.raw", " = Valkyria = \n")

    def cached(repo: str, name: str) -> Path:
        assert (repo, name) == ("ggml-org/ci", "wikitext-2-raw-v1.zip")
        return archive

    monkeypatch.setattr(samples.hub, "dataset_file", cached)
    assert read_text(None) == Text("wikitext-2-raw/wiki.train.raw", b" = Valkyria = \n")
