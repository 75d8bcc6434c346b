"""Whatever a user gets wrong is answered with one line, an exit code, and no file."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.shapes import WIDE
from helpers.tiny_models import write_tiny
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jquant.core import TensorSpec
from jquant.io import GgufSink
from jquant_cli import _errors
from jquant_cli.main import app


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return write_tiny(folder, "LlamaForCausalLM", **WIDE)


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(*arguments: object, out: Path, code: int = _errors.INPUT) -> str:
    """The one line with which the command ends; checks the exit code and that nothing was written."""
    before = out.read_bytes() if out.is_file() else None
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments), str(out), "--quiet"])
    lines = result.stderr.splitlines()
    assert result.exit_code == code, result.output
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("jquant: ")
    assert (out.read_bytes() if out.is_file() else None) == before
    return lines[0]


def test_a_folder_that_does_not_exist(tmp_path):
    assert "no/such/folder" in refused("./no/such/folder", out=tmp_path / "out.gguf")


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "safetensors" in refused(tmp_path / "empty", out=tmp_path / "out.gguf")


def test_an_unknown_type_is_answered_with_similar_ones(model, tmp_path):
    assert "Q4_K_M" in refused(model, "--type", "Q4_KM", out=tmp_path / "out.gguf")


def test_an_unknown_architecture_is_answered_with_the_known_ones(copy, tmp_path):
    edit_config(copy, architectures=["FooForCausalLM"], model_type="foo")
    message = refused(copy, out=tmp_path / "out.gguf")
    assert "FooForCausalLM" in message
    assert "LlamaForCausalLM" in message


def test_a_config_key_that_is_not_handled_is_named(copy, tmp_path):
    edit_config(copy, residual_multiplier=0.22)
    assert "residual_multiplier" in refused(copy, out=tmp_path / "out.gguf")


def test_a_config_that_is_no_json(copy, tmp_path):
    (copy / "config.json").write_text("{")
    assert "config.json" in refused(copy, out=tmp_path / "out.gguf")


def test_truncated_safetensors(copy, tmp_path):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert "model.safetensors" in refused(copy, out=tmp_path / "out.gguf")


def test_a_header_that_claims_more_bytes_than_the_file_has(copy, tmp_path):
    file = copy / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    assert "model.safetensors" in refused(copy, out=tmp_path / "out.gguf")


def test_a_tensor_that_the_index_names_but_no_file_has(copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    gone = sorted(tensors)[-1]
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    del tensors[gone]
    save_file(tensors, copy / "model-00001-of-00001.safetensors")
    assert gone in refused(copy, out=tmp_path / "out.gguf")


def test_a_shape_that_is_not_as_the_config_says(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    edit_config(copy, intermediate_size=config["intermediate_size"] + 256)
    message = refused(copy, out=tmp_path / "out.gguf")
    assert str(config["intermediate_size"]) in message
    assert str(config["intermediate_size"] + 256) in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["Q4_K_M", "F32", "Q8_0"])
def test_a_weight_that_is_no_number_is_named_with_its_position(copy, tmp_path, kind, value):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    damaged = tensors[name].copy()
    damaged[3, 5] = value
    save_file(tensors | {name: damaged}, copy / "model.safetensors")
    message = refused(copy, "--type", kind, out=tmp_path / "out.gguf")
    assert "blk.0.ffn_up.weight" in message
    assert "[3, 5]" in message


def test_an_output_folder_that_does_not_exist(model, tmp_path):
    message = refused(model, out=tmp_path / "nowhere" / "out.gguf", code=_errors.OUTPUT)
    assert "nowhere" in message


def test_an_output_that_cannot_be_created(model, tmp_path):
    (tmp_path / "file").touch()
    refused(model, out=tmp_path / "file" / "out.gguf", code=_errors.OUTPUT)


def test_an_output_that_exists_is_kept_without_force(model, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    assert "--force" in refused(model, out=out, code=_errors.OUTPUT)


def test_a_full_disk(model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        message = refused(model, "--type", "F32", out=disk / "out.gguf", code=_errors.OUTPUT)
        assert "space" in message
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_imatrix_of_another_model(model, tmp_path):
    file = tmp_path / "imatrix.dat"
    name = b"blk.0.other.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii4f", 1, 4, 1, 1, 1, 1)
    file.write_bytes(struct.pack("<i", 1) + entry)
    assert "another model" in refused(model, "--imatrix", file, out=tmp_path / "out.gguf")


def test_an_imatrix_with_rows_of_another_length(model, tmp_path):
    file = tmp_path / "imatrix.dat"
    name = b"blk.0.ffn_up.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii4f", 1, 4, 1, 1, 1, 1)
    file.write_bytes(struct.pack("<i", 1) + entry)
    message = refused(model, "--imatrix", file, out=tmp_path / "out.gguf")
    assert "blk.0.ffn_up.weight" in message


def test_a_file_that_is_no_imatrix(model, tmp_path):
    assert "config.json" in refused(model, "--imatrix", model / "config.json", out=tmp_path / "out.gguf")


def test_an_unknown_pre_tokenizer(copy, tmp_path):
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Punctuation", "behavior": "Isolated"}
    file.write_text(json.dumps(tokenizer))
    assert "--pre-tokenizer" in refused(copy, out=tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("ffn_up", "ffn_up"),
        ("ffn_up=Q9_K", "Q9_K"),
        ("(=Q8_0", "("),
        ("no_such_tensor=Q8_0", "no_such_tensor"),
    ],
)
def test_a_rule_that_says_nothing(model, tmp_path, rule, expected):
    assert expected in refused(model, "--rule", rule, out=tmp_path / "out.gguf")


def test_a_bad_line_of_a_rules_file_is_named_with_its_number(model, tmp_path):
    file = tmp_path / "rules.txt"
    file.write_text("ffn_up=Q8_0\nffn_down=Q9_K\n")
    message = refused(model, "--rules", file, out=tmp_path / "out.gguf")
    assert "rules.txt" in message
    assert "2" in message


def test_a_fallback_is_an_error_where_it_is_forbidden(tmp_path):
    folder = tmp_path / "narrow"
    write_tiny(folder, "LlamaForCausalLM", **WIDE | {"hidden_size": 192, "head_dim": 48})
    message = refused(folder, "--no-fallback", out=tmp_path / "out.gguf")
    assert "192" in message


def test_a_type_that_needs_importance_says_how_to_get_it(model, tmp_path):
    assert "--imatrix" in refused(model, "--type", "IQ2_XXS", out=tmp_path / "out.gguf")


def test_resuming_another_job_is_refused(model, tmp_path):
    out = tmp_path / "out.gguf"
    written, missing = TensorSpec("a", (1, 4), "F32"), TensorSpec("b", (1, 4), "F32")
    sink = GgufSink(out, {}, [written, missing], fingerprint="another job")
    sink.write("a", 0, np.zeros((1, 16), np.uint8))
    sink.finish("a")
    sink.close()
    refused(model, "--resume", out=out, code=_errors.OUTPUT)


def test_truncated_gguf(model, tmp_path):
    whole = tmp_path / "whole.gguf"
    CliRunner().invoke(app, ["quantize", str(model), str(whole), "--type", "F16", "--quiet"])
    data = whole.read_bytes()
    for size in (2, 20, 200, len(data) - 100):
        cut = tmp_path / f"cut-{size}.gguf"
        cut.write_bytes(data[:size])
        assert cut.name in refused(cut, out=tmp_path / "out.gguf")


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_weights_too_large_for_the_type_are_refused(copy, tmp_path, kind):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * np.float32(1e30)}, copy / "model.safetensors")
    message = refused(copy, "--type", kind, out=tmp_path / "out.gguf")
    assert "blk.0.ffn_up.weight" in message
    assert "BF16" in message
