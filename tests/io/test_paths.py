"""Models at a URL: read by byte range, with the bytes that a copy on this machine gives."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers.commands import JQUANT
from helpers.converted import convert
from helpers.tiny_models import write_tiny

from jquant.checkpoints.model import open_model
from jquant.core import UserError
from jquant.io import GgufSource, hub
from jquant.io.paths import open_url
from jquant.plan import plan
from jquant.writers.gguf import write_gguf


@pytest.fixture
def memory():
    """fsspec's file system in memory, and the ranges that are read of it."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def put(system, path: Path, target: str) -> None:
    for file in path.iterdir():
        system.pipe_file(f"{target}/{file.name}", file.read_bytes())


def quantized(model, out: Path) -> bytes:
    write_gguf(model, plan(model.source.specs, model.metadata, "Q8_0"), out)
    return out.read_bytes()


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_elsewhere_gives_the_bytes_of_one_here(shards, memory, tmp_path):
    folder = write_tiny(tmp_path / "hf", "LlamaForCausalLM", hidden_size=256, shards=shards)
    put(memory, folder, "/models/hf")
    here = quantized(open_model(folder, name="x"), tmp_path / "here.gguf")
    there = quantized(open_model(hub.resolve("memory://models/hf"), name="x"), tmp_path / "there.gguf")
    assert there == here


def test_a_gguf_file_elsewhere_is_read_by_rows(memory, tmp_path, monkeypatch):
    path = convert(write_tiny(tmp_path / "hf", "LlamaForCausalLM"), tmp_path / "model.gguf")
    memory.pipe_file("/models/model.gguf", path.read_bytes())
    here, there = GgufSource(path), GgufSource(open_url("memory://models/model.gguf"))
    assert there.specs == here.specs
    assert list(there.metadata) == list(here.metadata)
    ranges = []

    def recorded(path, start=None, end=None, **more):
        ranges.append(end - start)
        return original(path, start=start, end=end, **more)

    original = memory.cat_file
    monkeypatch.setattr(type(memory), "cat_file", lambda self, *given, **named: recorded(*given, **named))
    name = "blk.1.ffn_up.weight"
    np.testing.assert_array_equal(there.read(name, 3, 7), here.read(name, 3, 7))
    assert ranges == [4 * here.specs[name].row_bytes]


def test_a_header_longer_than_the_first_read_is_read_on(memory, tmp_path, monkeypatch):
    path = convert(write_tiny(tmp_path / "hf", "LlamaForCausalLM"), tmp_path / "model.gguf")
    memory.pipe_file("/models/model.gguf", path.read_bytes())
    monkeypatch.setattr("jquant.io._gguf_header._REMOTE_HEADER", 100)
    assert GgufSource(open_url("memory://models/model.gguf")).specs == GgufSource(path).specs


def test_a_cut_file_elsewhere_is_refused(memory, tmp_path):
    path = convert(write_tiny(tmp_path / "hf", "LlamaForCausalLM"), tmp_path / "model.gguf")
    memory.pipe_file("/models/model.gguf", path.read_bytes()[:-64])
    with pytest.raises(UserError, match="truncated"):
        GgufSource(open_url("memory://models/model.gguf"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing/here", "no such file or folder"),
        ("nosuch://bucket/model", "nosuch:// cannot be read here"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(url, message):
    with pytest.raises(UserError, match=message) as error:
        hub.resolve(url)
    assert "\n" not in str(error.value)


def test_the_commands_take_urls_or_say_that_they_do_not(tmp_path):
    folder = write_tiny(tmp_path / "hf", "LlamaForCausalLM", hidden_size=256)
    url, out = f"file://{folder}", tmp_path / "out.gguf"

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([JQUANT, *arguments], capture_output=True, text=True)

    ended = run("quantize", url, str(out), "--type", "Q8_0", "--quiet")
    assert ended.returncode == 0, ended.stderr
    here = tmp_path / "here.gguf"
    assert run("quantize", str(folder), str(here), "--type", "Q8_0", "--quiet").returncode == 0
    assert out.read_bytes() == here.read_bytes()
    refused = run("quantize", url, str(tmp_path / "w8a8"), "--type", "W8A8")
    assert refused.returncode == 3
    assert "needs the model on this machine" in refused.stderr
    shutil.rmtree(folder)
    gone = run("quantize", url, str(tmp_path / "b.gguf"))
    assert gone.returncode == 3
    assert "no such file" in gone.stderr
