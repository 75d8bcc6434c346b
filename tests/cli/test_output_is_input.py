"""A command whose output is one of its inputs is refused before anything is read, --force or not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.commands import attempt
from helpers.tiny_models import LINES, write_gguf, write_tiny

from jquant.checkpoints.model import open_model


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    model = open_model(write_tiny(tmp_path / "model", "LlamaForCausalLM"))
    write_gguf(tmp_path / "m.gguf", dict(model.metadata), model.source)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    (tmp_path / "link.gguf").symlink_to("m.gguf")
    (tmp_path / "split-00001-of-00001.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUANTIZE, ANALYZE, TEXT = "quantize m.gguf {} -t Q8_0", "analyze m.gguf -o {}", "-c text.txt --samples 2"


@pytest.mark.parametrize(
    "command",
    [
        QUANTIZE.format("m.gguf"),
        QUANTIZE.format("./m.gguf"),
        QUANTIZE.format("link.gguf"),
        QUANTIZE.format("{here}/m.gguf"),
        "quantize link.gguf m.gguf -t Q8_0",
        "quantize m.gguf text.txt --like text.txt",
        "quantize split-00001-of-00001.gguf split.gguf -t Q8_0 --max-shard-size 1GB",
        f"{ANALYZE.format('m.gguf')} {TEXT}",
        f"{ANALYZE.format('text.txt')} {TEXT}",
        "evaluate m.gguf --no-text --check --html m.gguf",
        "evaluate m.gguf --text text.txt --csv text.txt",
    ],
)
def test_an_output_that_is_an_input_is_refused(folder, command):
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    done = attempt(*command.format(here=folder).split(), "--force")
    assert done.exit_code == 4, done.output
    assert "what this run reads" in done.output
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert os.path.islink(folder / "link.gguf")  # noqa: PTH114
