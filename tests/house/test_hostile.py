"""Damaged files end with a clean error or a right result: no traceback, no hang, no memory without bound."""

from __future__ import annotations

import json
import random
import resource
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pytest
from helpers.mutations import OF_BINARY, OF_TEXT
from helpers.tiny_models import write_gguf, write_tiny
from pyarrow import parquet

from jquant.checkpoints.model import open_model
from jquant.core import UserError
from jquant.io import imatrix as imatrix_file
from jquant.io.imatrix import Imatrix
from jquant.plan import parse_profile, parse_rules_file, preset_text
from jquant.text._tables import rows_of_file
from jquant.text.token_ids import from_metadata

LLAMA = "LlamaForCausalLM"
SECONDS, BYTES = 10, 500_000_000  # of one file


class Reader(NamedTuple):
    make: Callable[[Path], Path]  # in a folder: the file that is damaged
    read: Callable[[Path], object]
    binary: bool = True


def gguf_file(folder: Path) -> Path:
    model = open_model(write_tiny(folder / "m", LLAMA))
    write_gguf(folder / "m.gguf", dict(model.metadata), model.source)
    return folder / "m.gguf"


def read_gguf(path: Path) -> None:
    model = open_model(path)
    for name in model.source.specs:
        model.source.read(name)
    if "tokenizer.ggml.model" in model.metadata:
        from_metadata(model.metadata).encode("Hello there, 123")


def in_folder(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return write_tiny(folder / "m", LLAMA, shards=2) / name

    return make


def read_folder(path: Path) -> None:
    model = open_model(path.parent)
    for name in model.source.specs:
        model.source.read(name, 0, 1)
    from_metadata(model.metadata).encode("Hello there, 123")


def importance(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        entries = {"blk.0.attn_q.weight": np.ones((1, 64), np.float32)}
        matrix = Imatrix(entries, {n: np.ones(1, np.float32) for n in entries}, ["text"], 4, 32)
        write = imatrix_file.write_dat if name.endswith(".dat") else imatrix_file.write_gguf
        write(folder / name, matrix)
        return folder / name

    return make


def text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def table(folder: Path) -> Path:
    rows = pyarrow.table({"text": [f"line {i} of a text" for i in range(50)]})
    parquet.write_table(rows, folder / "t.parquet")
    return folder / "t.parquet"


def parsed(parse: Callable[[str, str], object]) -> Callable[[Path], object]:
    return lambda path: parse(path.read_text("utf-8", "replace"), path.name)


def rows(path: Path) -> list:
    return list(rows_of_file(path, path.name))


LINES = "\n".join(json.dumps({"text": f"line {i}"}) for i in range(30))

READERS = {
    "gguf": Reader(gguf_file, read_gguf),
    "safetensors": Reader(in_folder("model-00001-of-00002.safetensors"), read_folder),
    "index": Reader(in_folder("model.safetensors.index.json"), read_folder, binary=False),
    "config": Reader(in_folder("config.json"), read_folder, binary=False),
    "tokenizer": Reader(in_folder("tokenizer.json"), read_folder, binary=False),
    "tokenizer_config": Reader(in_folder("tokenizer_config.json"), read_folder, binary=False),
    "imatrix": Reader(importance("i.gguf"), imatrix_file.read),
    "imatrix.dat": Reader(importance("i.dat"), imatrix_file.read),
    "profile": Reader(text("p.toml", preset_text("balanced")), parsed(parse_profile), binary=False),
    "rules": Reader(
        text("r.txt", "ffn_(up|down)=Q6_K\nattn_v=Q8_0\n"), parsed(parse_rules_file), binary=False
    ),
    "jsonl": Reader(text("t.jsonl", LINES), rows, binary=False),
    "parquet": Reader(table, rows),
}


def outcome(reader: Reader, file: Path) -> str:
    """What reading it comes to; anything but these two is a fault of ours, and raised."""
    try:
        reader.read(file)
    except UserError:
        return "refused"
    return "read"


def try_mutations(name: str, folder: Path, seeds: range) -> Counter:
    reader = READERS[name]
    file = reader.make(folder)
    good, kinds = file.read_bytes(), OF_BINARY if reader.binary else OF_TEXT
    reader.read(file)
    before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Counter()
    for seed in seeds:
        rng = random.Random(zlib.crc32(name.encode()) + seed)
        mutate = rng.choice(kinds)
        file.write_bytes(mutate(good, rng))
        start = time.monotonic()
        try:
            found[outcome(reader, file)] += 1
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}, {mutate.__name__}: {type(error).__name__}") from error
        assert time.monotonic() - start < SECONDS, f"{name}, seed {seed}, {mutate.__name__}: hangs"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < BYTES, f"{name}: {grown / 1e6:.0f} MB"
    return found


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read(name, tmp_path):
    found = try_mutations(name, tmp_path, range(20))
    assert found["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_refused_or_read(name, tmp_path):
    found = try_mutations(name, tmp_path, range(20, 900))
    assert found["refused"] > 20
