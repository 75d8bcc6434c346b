"""`jquant inspect` against what gguf-py reads, on the real model that the demo uses."""

from __future__ import annotations

import json

import gguf
from helpers.tiny_models import write_tiny
from typer.testing import CliRunner

from jquant_cli.demo import package_model
from jquant_cli.main import app


def inspect(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_holds_every_tensor_and_key_of_the_file():
    model = package_model()
    found = json.loads(inspect(model, "--json"))
    reader = gguf.GGUFReader(str(model))
    assert [(t["name"], t["type"], t["bytes"], t["shape"]) for t in found["tensors"]] == [
        (t.name, t.tensor_type.name, t.n_bytes, t.shape[::-1].tolist()) for t in reader.tensors
    ]
    expected = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert found["metadata"] == expected


def test_the_table_ends_with_size_by_type():
    text = inspect(package_model())
    assert "llama.block_count" in text
    assert text.splitlines()[-1].startswith("total")


def test_a_filter_keeps_what_it_matches():
    text = inspect(package_model(), "--filter", r"blk\.3\.")
    assert "blk.3.attn_q.weight" in text
    assert "blk.4.attn_q.weight" not in text


def test_a_hugging_face_folder_is_inspected_too(tmp_path):
    write_tiny(tmp_path / "model", "LlamaForCausalLM")
    assert "model.embed_tokens.weight" in inspect(tmp_path / "model")


def test_a_bad_filter_is_a_wrong_command_line():
    assert CliRunner().invoke(app, ["inspect", str(package_model()), "--filter", "("]).exit_code == 2
