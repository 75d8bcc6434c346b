"""`jquant quantize`, judged by the file it writes, as gguf-py and llama.cpp read it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from helpers import k_blocks, tables
from helpers.commands import JQUANT, printed
from helpers.gguf_files import imatrix_file, tensors
from helpers.shapes import WIDE
from helpers.tiny_models import write_tiny
from safetensors.numpy import load_file
from typer.testing import CliRunner

import jquant
from jquant_cli.main import app


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return write_tiny(folder, "LlamaForCausalLM", **WIDE)


def encoded(format: jquant.Format, x: np.ndarray) -> np.ndarray:
    """uint8 [blocks, bytes], by one program a format."""
    return k_blocks.encode(format, x, to=(1 << 17) // format.block_size)


@pytest.mark.parametrize("kind", tables.rows(["F16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K"], {"F16", "Q8_0"}))
def test_the_file_holds_what_quantize_gives_for_each_tensor(model, tmp_path, kind):
    out = tmp_path / "out.gguf"
    printed("quantize", model, out, "--type", kind, "-q")
    weights = load_file(model / "model.safetensors")
    written = tensors(out)
    for gguf_name, hf_name in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    }.items():
        tensor = written[gguf_name]
        format = jquant.FORMATS[tensor.tensor_type.name]
        expected = encoded(format, weights[hf_name].astype(np.float32))
        data = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(expected.shape)
        np.testing.assert_array_equal(data, expected, err_msg=gguf_name)


@pytest.mark.parametrize("kind", ["IQ4_NL", pytest.param("Q4_K_M", marks=pytest.mark.every)])
def test_importance_changes_exactly_the_tensors_that_the_imatrix_names(model, tmp_path, kind):
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    file = imatrix_file(tmp_path / "imatrix.gguf", model)
    printed("quantize", model, plain, "--type", kind, "--pure", "-q")
    printed("quantize", model, weighted, "--type", kind, "--pure", "--imatrix", file, "-q")
    before, after = tensors(plain), tensors(weighted)
    for name, tensor in before.items():
        changed = not np.array_equal(tensor.data, after[name].data)
        assert changed == (name.startswith("blk.0.") and len(tensor.shape) == 2), name


def test_the_header_says_which_imatrix_was_used(model, tmp_path):
    out = tmp_path / "out.gguf"
    file = imatrix_file(tmp_path / "imatrix.gguf", model)
    printed("quantize", model, out, "--type", "IQ4_NL", "--pure", "--imatrix", file, "-q")
    fields = gguf.GGUFReader(str(out)).fields
    assert fields["quantize.imatrix.file"].contents() == str(file)
    assert fields["quantize.imatrix.dataset"].contents() == "made up"
    assert fields["quantize.imatrix.entries_count"].contents() == 7
    assert fields["quantize.imatrix.chunks_count"].contents() == 3
    assert fields["general.name"].contents() == model.name
    assert fields["general.file_type"].contents() == 25
    assert fields["general.quantization_version"].contents() == 2


def test_a_gguf_of_an_architecture_nobody_knows_keeps_names_and_metadata(tmp_path):
    source, out = tmp_path / "new.gguf", tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(str(source), "marvin-9")
    writer.add_string("marvin-9.mood", "gloomy")
    writer.add_array("marvin-9.sizes", [3, 1, 4])
    rng = np.random.default_rng(0)
    writer.add_tensor("brain.0.weight", rng.standard_normal((8, 256), np.float32))
    writer.add_tensor("brain.0.bias", rng.standard_normal(8).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    printed("quantize", source, out, "--type", "Q8_0", "-q")
    reader = gguf.GGUFReader(str(out))
    assert reader.fields["general.architecture"].contents() == "marvin-9"
    assert reader.fields["marvin-9.mood"].contents() == "gloomy"
    assert reader.fields["marvin-9.sizes"].contents() == [3, 1, 4]
    kinds = {name: t.tensor_type.name for name, t in tensors(out).items()}
    assert kinds == {"brain.0.weight": "Q8_0", "brain.0.bias": "F32"}


@pytest.mark.parametrize("kind", tables.rows(["F16", "IQ4_NL"], {"F16"}))
def test_a_quantized_gguf_is_decoded_and_encoded_again(model, tmp_path, kind):
    first, second = tmp_path / "q8.gguf", tmp_path / "again.gguf"
    printed("quantize", model, first, "--type", "Q8_0", "-q")
    printed("quantize", first, second, "--type", kind, "--pure", "-q")
    name = "blk.0.ffn_up.weight"
    decoded = gguf.dequantize(tensors(first)[name].data, gguf.GGMLQuantizationType.Q8_0)
    expected = encoded(jquant.FORMATS[kind], decoded)
    data = np.ascontiguousarray(tensors(second)[name].data).view(np.uint8).reshape(expected.shape)
    np.testing.assert_array_equal(data, expected)


def test_llama_cpp_loads_shards(model, tmp_path):
    out = tmp_path / "out.gguf"
    report = json.loads(
        printed("quantize", model, out, "--type", "Q8_0", "--max-shard-size", "1MB", "--json", "-q")
    )
    files = [Path(file["path"]) for file in report["files"]]
    assert len(files) > 1
    assert all(file.stat().st_size <= 1_000_000 for file in files)
    llm = llama_cpp.Llama(str(files[0]), n_ctx=32, verbose=False)
    assert llm.eval([1, 2, 3]) is None
    whole = tmp_path / "whole.gguf"
    printed("quantize", files[0], whole, "--type", "Q8_0", "-q")
    direct = tmp_path / "direct.gguf"
    printed("quantize", model, direct, "--type", "Q8_0", "-q")
    assert whole.read_bytes() == direct.read_bytes()


def test_dry_run_shows_the_plan_and_writes_nothing(model, tmp_path):
    out = tmp_path / "out.gguf"
    text = printed("quantize", model, out, "--type", "Q4_K_M", "--dry-run", "-q")
    assert "blk.0.ffn_down.weight" in text
    assert "bpw" in text
    report = json.loads(printed("quantize", model, "--type", "Q4_K_M", "--dry-run", "--json", "-q"))
    assert report["file_type"] == "Q4_K_M"
    assert not list(tmp_path.iterdir())


def test_rules_choose_types_and_the_first_match_wins(model, tmp_path):
    file = tmp_path / "rules.txt"
    file.write_text("blk\\.1\\.ffn=Q5_0 attn_v=F16\n")
    rules = ["--rule", "blk\\.1\\.ffn_up=Q8_0", "--rules", file]
    report = json.loads(printed("quantize", model, "--type", "Q4_0", *rules, "--dry-run", "--json", "-q"))
    kinds = {t["name"]: t["type"] for t in report["tensors"]}
    assert kinds["blk.1.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "Q5_0"
    assert kinds["blk.0.attn_v.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"


def test_json_is_all_that_quiet_prints(model, tmp_path):
    arguments = ["quantize", str(model), str(tmp_path / "out.gguf"), "--type", "Q8_0", "--json", "-q"]
    result = CliRunner().invoke(app, arguments)
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["files"][0]["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert report["peak_memory_bytes"] > 0


def test_a_fallback_is_remarked_with_its_cost(tmp_path):
    folder = tmp_path / "narrow"
    write_tiny(folder, "LlamaForCausalLM", **WIDE | {"hidden_size": 192, "head_dim": 48})
    result = CliRunner().invoke(app, ["quantize", str(folder), "--type", "Q4_K_M", "--dry-run"])
    assert result.exit_code == 0
    assert "Q4_K → Q5_0" in result.stderr
    assert "bpw" in result.stderr
    assert "192" in result.stdout


def test_no_output_and_no_dry_run_is_a_wrong_command_line(model):
    assert CliRunner().invoke(app, ["quantize", str(model)]).exit_code == 2


def test_the_number_of_threads_does_not_change_the_bytes(model, tmp_path):
    files = [tmp_path / f"{threads}.gguf" for threads in (1, 2, 5)]
    for threads, file in zip((1, 2, 5), files, strict=True):
        printed("quantize", model, file, "--type", "Q8_0", "--threads", threads, "-q")
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path):
    folder, whole, out = tmp_path / "llama", tmp_path / "whole.gguf", tmp_path / "out.gguf"
    write_tiny(folder, "LlamaForCausalLM", num_hidden_layers=24, hidden_size=512, intermediate_size=1024)
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    command = [JQUANT, "quantize", str(folder), "--type", "Q4_K_M", "-q", "--threads", "1"]
    subprocess.run([*command, str(whole)], check=True, env=environment, stdout=subprocess.DEVNULL)
    start = time.monotonic()
    subprocess.run([*command, str(whole), "--force"], check=True, env=environment, stdout=subprocess.DEVNULL)
    duration = time.monotonic() - start
    rng = np.random.default_rng(0)
    interrupted = resumed_with_work_left = 0
    for moment in np.sort(rng.uniform(0.3, 1.0, 10)) * duration:
        process = subprocess.Popen(
            [*command, str(out), "--resume"], env=environment, stdout=subprocess.DEVNULL
        )
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        interrupted += process.wait() == -signal.SIGKILL
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
        else:
            resumed_with_work_left += Path(f"{out}.partial").exists()
    subprocess.run([*command, str(out), "--resume"], check=True, env=environment, stdout=subprocess.DEVNULL)
    assert out.read_bytes() == whole.read_bytes()
    assert interrupted
    assert resumed_with_work_left
    assert {p.name for p in tmp_path.iterdir()} == {"llama", "whole.gguf", "out.gguf", "cache"}


@pytest.mark.slow
def test_the_demo_writes_a_file_with_which_llama_cpp_answers(tmp_path):
    out = tmp_path / "demo.gguf"
    answer = printed("demo", out)
    assert "Paris" in answer
    assert {t.tensor_type.name for t in tensors(out).values()} >= {"IQ4_NL", "Q8_0", "F32"}


LOW_BIT = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LOW_BIT, "IQ4_XS", "IQ4_NL", "TQ1_0", "TQ2_0"])
def test_llama_cpp_runs_a_file_of_each_low_bit_type(model, tmp_path, kind):
    out = tmp_path / "out.gguf"
    file = imatrix_file(tmp_path / "imatrix.gguf", model, prefix="blk.")
    printed("quantize", model, out, "--type", kind, "--imatrix", file, "-q")
    llm = llama_cpp.Llama(str(out), n_ctx=64, logits_all=True, verbose=False)
    llm.eval(list(range(3, 35)))
    logits = np.asarray(llm.scores[:32])
    assert np.isfinite(logits).all()
    assert logits.std(axis=0).max() > 0


def test_a_low_bit_run_reports_the_error_of_the_bytes_and_warns_where_it_is_severe(model, tmp_path):
    out = tmp_path / "out.gguf"
    result = CliRunner().invoke(
        app, ["quantize", str(model), str(out), "--type", "TQ1_0", "--pure", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert "severe damage is to be expected" in result.stderr
    assert "--imatrix" in result.stderr
    quality = json.loads(result.stdout)["quality"]
    weights = load_file(model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].astype(np.float64)
    tensor = tensors(out)["blk.1.ffn_down.weight"]
    decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    expected = ((weights - decoded) ** 2).sum() / (weights**2).sum()
    np.testing.assert_allclose(quality["relative_errors"]["blk.1.ffn_down.weight"], expected, rtol=1e-4)
    assert quality["mean_relative_error"] > 0.1


def test_a_type_of_many_bits_is_not_read_back(model, tmp_path):
    report = json.loads(printed("quantize", model, tmp_path / "out.gguf", "--type", "Q8_0", "--json", "-q"))
    assert report["quality"]["relative_errors"] == {}
    assert report["quality"]["warnings"] == []


@pytest.mark.parametrize("kind", ["TQ1_0", pytest.param("TQ2_0", marks=pytest.mark.every)])
def test_a_tensor_that_is_ternary_already_is_stored_without_loss_and_named(tmp_path, kind):
    source, out = tmp_path / "bitnet.gguf", tmp_path / "out.gguf"
    rng = np.random.default_rng(0)
    scales = np.float16(rng.uniform(0.01, 2, (64, 1))).astype(np.float32)
    ternary = scales * rng.integers(-1, 2, (64, 512)).astype(np.float32)
    ternary[3] = 0
    writer = gguf.GGUFWriter(str(source), "bitnet")
    writer.add_tensor("blk.0.ffn_up.weight", ternary)
    writer.add_tensor("blk.0.ffn_down.weight", rng.standard_normal((64, 512), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = CliRunner().invoke(app, ["quantize", str(source), str(out), "--type", kind, "--json"])
    assert "stored without loss: 1 tensors, such as blk.0.ffn_up.weight" in result.stderr
    assert json.loads(result.stdout)["quality"]["lossless"] == ["blk.0.ffn_up.weight"]
    tensor = tensors(out)["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), ternary)


def test_effort_changes_the_bytes_and_is_part_of_what_a_resumed_run_must_share(model, tmp_path):
    fast, best = tmp_path / "fast.gguf", tmp_path / "best.gguf"
    printed("quantize", model, fast, "--type", "IQ4_NL", "--pure", "-q")
    printed("quantize", model, best, "--type", "IQ4_NL", "--pure", "--effort", "best", "-q")
    assert fast.stat().st_size == best.stat().st_size
    assert fast.read_bytes() != best.read_bytes()
    result = CliRunner().invoke(app, ["quantize", str(model), str(fast), "--effort", "most"])
    assert result.exit_code == 2
