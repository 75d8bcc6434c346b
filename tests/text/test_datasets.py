"""Calibration data in parquet files and on the hub: what pyarrow and gzip wrote, what a stand-in serves."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from helpers.converted import convert
from helpers.stand_in_hub import StandIn, serve
from helpers.tiny_models import CHAT, LINES, write_tiny
from pyarrow import parquet

from jquant.core import UserError
from jquant.io import GgufSource
from jquant.text import datasets
from jquant.text.samples import Table, Text, read_text, sample
from jquant.text.token_ids import TokenIds, from_metadata


def parquet_bytes(table: dict[str, list], **options: object) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(table), file, **options)
    return file.getvalue()


def json_lines(*entries: object) -> bytes:
    return "\n".join(map(json.dumps, entries)).encode()


WIKI = [
    line for text in "\n".join(LINES).splitlines() for line in ("", f" = {text[:8]} = \n", "", f" {text} \n")
]
CARD = b"""---
configs:
- config_name: wikitext-103-v1
  data_files:
  - split: train
    path: wikitext-103-v1/train-*
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: wikitext-2-raw-v1/train-*
---
words
"""
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in LINES]
REPOS = {
    "datasets/Salesforce/wikitext": {
        "README.md": CARD,
        "wikitext-103-v1/train-00000-of-00001.parquet": parquet_bytes({"text": ["103 \n"]}),
        "wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet_bytes({"text": ["test \n"]}),
        "wikitext-2-raw-v1/train-00000-of-00001.parquet": parquet_bytes({"text": WIKI}),
    },
    "datasets/org/chats": {
        "data/train_sft-00000-of-00001.parquet": parquet_bytes({"prompt": LINES, "messages": CHATS}),
        "data/test_sft-00000-of-00001.parquet": parquet_bytes({"prompt": LINES, "messages": CHATS}),
        "README.md": b"""---
configs:
- config_name: default
  data_files:
  - {split: train_sft, path: data/train_sft-*}
  - {split: test_sft, path: data/test_sft-*}
---
""",
    },
    "datasets/org/plain": {"train.jsonl": json_lines(*({"text": t} for t in LINES)), "test.jsonl": b"{}"},
    "datasets/org/c4": {
        "README.md": b"---\nconfigs:\n- config_name: en\n  data_files: en/c4-train.*.json.gz\n"
        b"  default: true\n"
        b"- config_name: de\n  data_files: de/**\n---\n",
        **{
            f"en/c4-train.0000{i}-of-00003.json.gz": gzip.compress(
                json_lines(*({"text": f"{t} {i}"} for t in LINES))
            )
            for i in range(3)
        },
        "de/c4-train.00000-of-00001.json.gz": gzip.compress(json_lines({"text": "Hallo"})),
    },
    "datasets/org/lines": {"a.txt": "\n".join(LINES).encode()},
    "datasets/org/images": {"train/0.png": b"png", "README.md": b"words"},
    "datasets/org/broken": {"train.jsonl": json_lines(*[{"text": "a"}] * 36) + b"\n{oops"},
    "datasets/org/gated": {"train.jsonl": b"{}"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TokenIds:
    folder = tmp_path_factory.mktemp("model")
    path = convert(write_tiny(folder / "hf", "MistralForCausalLM"), folder / "out.gguf")
    return from_metadata(GgufSource(path).metadata)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(REPOS) as server:
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def table(endpoint: str, tmp_path: Path) -> Callable[[str], Table]:
    return lambda name: datasets.table(name, cache_dir=tmp_path / "cache", endpoint=endpoint)


def texts(rows: Table) -> list[object]:
    return [row.content for part in rows.parts for row in part()]


def downloads() -> list[str]:
    return [path.partition("/main/")[2] for path in StandIn.asked if path.startswith("GET datasets/")]


def test_a_row_of_parquet_is_a_sample_as_a_line_of_json_is(tokenizer, tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes({"id": list(range(len(LINES))), "text": LINES}))
    (tmp_path / "a.jsonl").write_bytes(json_lines(*({"text": text} for text in LINES)))
    for seed in (None, 3):
        found, wanted = (
            sample(read_text(str(tmp_path / name)), tokenizer, samples=3, sequence_length=20, seed=seed)
            for name in ("a.parquet", "a.jsonl")
        )
        assert found.tokens.tolist() == wanted.tokens.tolist()
        assert found.dataset == "a.parquet"


def test_a_seed_chooses_rows_of_the_whole_file(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes({"text": [f"number {i}" for i in range(500)]}, row_group_size=50))
    everything = sample(read_text(str(path)), tokenizer, samples=500, sequence_length=12).tokens.tolist()
    first, again, other = (
        sample(read_text(str(path)), tokenizer, samples=40, sequence_length=12, seed=s).tokens.tolist()
        for s in (1, 1, 2)
    )
    assert first == again != other
    places = [everything.index(row) for row in first]
    assert places == sorted(set(places))
    assert max(places) > 400


def test_messages_of_parquet_go_through_the_chat_template(tokenizer, table):
    found = sample(table("org/chats:train_sft"), tokenizer, samples=2, sequence_length=80, chat_template=CHAT)
    rendered = f"<|im_start|>user\n{LINES[0]}<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert found.tokens[0, : found.lengths[0]].tolist() == tokenizer.encode(rendered, parse_special=True)[:80]


@pytest.mark.parametrize("name", ["Salesforce/wikitext:wikitext-2-raw-v1", "Salesforce/wikitext:wikitext-2-raw-v1:train"])  # fmt: skip  # noqa: E501
def test_rows_that_are_lines_are_read_as_one_text(name, tokenizer, table):
    text = "".join(line or "\n" for line in WIKI)
    found = sample(table(name), tokenizer, samples=4, sequence_length=50)
    wanted = sample(Text("a.txt", text.encode()), tokenizer, samples=4, sequence_length=50)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    assert found.dataset == name
    assert downloads() == ["README.md", "wikitext-2-raw-v1/train-00000-of-00001.parquet"]


def test_lines_are_read_no_further_than_samples_need(tokenizer):
    given = 0

    def rows():
        nonlocal given
        for given in range(100_000):
            yield datasets_row(given)

    found = sample(Table("lines", (rows,)), tokenizer, samples=2, sequence_length=50)
    assert found.tokens.shape == (2, 50)
    assert given < 100


def datasets_row(i: int):
    from jquant.text._tables import Row

    return Row(f"lines, row {i}", f"{LINES[i % len(LINES)]}\n")


def test_files_are_downloaded_as_far_as_rows_are_needed(tokenizer, table):
    found = sample(table("org/c4"), tokenizer, samples=len(LINES) + 1, sequence_length=20)
    assert len(found.tokens) == len(LINES) + 1
    assert downloads() == ["README.md", *(f"en/c4-train.0000{i}-of-00003.json.gz" for i in range(2))]


@pytest.mark.parametrize("seed", [None, 1])
def test_of_many_files_the_first_that_has_enough_rows_is_all_that_is_fetched(seed, tokenizer, table):
    sample(table("org/c4:en:train"), tokenizer, samples=len(LINES), sequence_length=20, seed=seed)
    assert downloads() == ["README.md", "en/c4-train.00000-of-00003.json.gz"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("org/plain", LINES),
        ("hf:org/plain:train", LINES),
        ("org/plain:train.jsonl", LINES),
        ("org/lines", [f"{line}\n" for line in "\n".join(LINES).splitlines()]),
        ("org/c4:de", ["Hallo"]),
        ("org/chats:test_sft", CHATS),
        ("org/chats:default:test_sft", CHATS),
        ("Salesforce/wikitext:wikitext-103-v1", ["103 \n"]),
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", ["test \n"]),
    ],
)
def test_a_name_means_a_configuration_a_split_or_a_file(name, wanted, table):
    assert texts(table(name)) == wanted


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Salesforce/wikitext", "has no configuration 'default'; choose one of .*:wikitext-103"),
        ("Salesforce/wikitext:wikitext-2-raw-v1:dev", "has no split 'dev'; choose one of .*raw-v1:test, "),
        ("Salesforce/wikitext:wiki", "has no configuration or split 'wiki'; choose one of"),
        ("org/chats", "has no split 'train'; choose one of org/chats:train_sft, org/chats:test_sft"),
        ("org/images", r"org/images: the dataset has no files of these kinds: .*; it has \.md, \.png"),
        ("org/images:train/0.png", "org/images:train/0.png: is no file of these kinds"),
        ("org/nothing", "org/nothing: neither a local path nor a public dataset of http"),
    ],
)  # fmt: skip
def test_a_dataset_without_it_says_what_it_has(name, message, table):
    with pytest.raises(UserError, match=message):
        table(name)


def test_a_gated_dataset_says_where_to_ask(table):
    with pytest.raises(UserError, match=r"access is restricted; ask for it at .*/datasets/org/gated, then"):
        texts(table("org/gated"))


def test_a_dataset_in_the_cache_is_read_without_a_connection(endpoint, tmp_path):
    name = "Salesforce/wikitext:wikitext-2-raw-v1"
    assert texts(datasets.table(name, cache_dir=tmp_path / "cache", endpoint=endpoint)) == WIKI
    nowhere = "http://127.0.0.1:9"
    assert texts(datasets.table(name, cache_dir=tmp_path / "cache", endpoint=nowhere)) == WIKI
    with pytest.raises(UserError, match=r"org/plain: cannot download it .* the cache has no copy"):
        datasets.table("org/plain", cache_dir=tmp_path / "cache", endpoint=nowhere)


def test_a_wrong_line_of_a_dataset_is_named(table):
    with pytest.raises(UserError, match=r"org/broken/train.jsonl, line 37: is not JSON"):
        texts(table("org/broken"))


GOOD = parquet_bytes({"text": ["some text " * 20] * 2000}, compression="none", use_dictionary=False)
BAD = {
    "no text": (parquet_bytes({"body": ["a"], "id": [1]}), "column 'text' nor 'messages', but body, id"),
    "numbers": (parquet_bytes({"text": [1]}), "a.parquet, row 1: 'text' is int"),
    "no messages": (parquet_bytes({"messages": [[{"from": "a"}]]}), "row 1: 'messages' must be a list of"),
    "no rows": (parquet_bytes({"text": []}), "no line or row of it has text"),
    "nulls": (parquet_bytes({"text": [None, "", " "]}), "no line or row of it has text"),
    "text": (b"some words", "a.parquet: is no whole parquet file after row 0"),
    "cut": (GOOD[: len(GOOD) // 2], "a.parquet: is no whole parquet file after row 0"),
    "overwritten": (GOOD[:200_000] + b"\xff" * 100_000 + GOOD[300_000:], "no whole parquet file after row"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_a_bad_parquet_file_is_refused_with_its_row(data, message, tokenizer, tmp_path):
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        sample(read_text(str(tmp_path / "a.parquet")), tokenizer, samples=5000, sequence_length=9)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no gzip", "a.jsonl.gz: is damaged after line 0"),
        (gzip.compress(json_lines(*[{"text": "a"}] * 99))[:-20], "a.jsonl.gz: is damaged after line"),
        (gzip.compress(b'{"text": "a"}\n' + b"\xff" * 9), "a.jsonl.gz: no UTF-8 text after line"),
    ],
    ids=["no gzip", "cut", "no UTF-8"],  # gzip writes the time: bytes as names would differ among workers
)
def test_a_bad_gzip_file_is_refused(data, message, tokenizer, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=message):
        sample(read_text(str(tmp_path / "a.jsonl.gz")), tokenizer, samples=500, sequence_length=9)


def test_without_pyarrow_the_command_that_installs_it_is_named(monkeypatch, tmp_path, tokenizer):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes({"text": LINES}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"not installed: pip install pyarrow"):
        sample(read_text(str(tmp_path / "a.parquet")), tokenizer, samples=1, sequence_length=9)


@pytest.mark.parametrize("name", ["absent.parquet", "data/absent.jsonl", "./org/name", "/org/name", "name"])
def test_what_looks_like_a_file_never_goes_to_the_hub(name, endpoint):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_text(name)
    Path("org").mkdir()
    with pytest.raises(UserError, match="nothing of this name in the folder org; write hf:org/name"):
        read_text("org/name")
    assert StandIn.asked == []


def test_the_command_calibrates_on_a_dataset_of_the_hub(endpoint, tmp_path):
    model = write_tiny(tmp_path / "model", "LlamaForCausalLM")
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [
        sys.executable,
        "-c",
        "from jquant_cli.main import main; main()",
        "analyze",
        str(model),
        "--json",
    ]
    arguments = ["--samples=3", "--sequence-length=40", "-c", "Salesforce/wikitext:wikitext-2-raw-v1"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert (report["dataset"], report["tokens"]) == ("Salesforce/wikitext:wikitext-2-raw-v1", 120)
