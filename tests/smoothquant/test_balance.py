"""`--balance-inputs`: the same model in the file, which llama.cpp's rounding of inputs harms less."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import attempt
from helpers.decoders import logits
from helpers.divergence import divergence
from helpers.outliers import calibration, with_outliers
from helpers.shapes import WIDE
from helpers.tables import rows
from helpers.tiny_models import LINES, write_gguf, write_tiny
from safetensors.numpy import load_file, save_file

from jquant.calibration import _importance as analyze
from jquant.checkpoints.fingerprint import common_facts
from jquant.checkpoints.model import Model, open_model
from jquant.checkpoints.rescaled import Factors, ScaledSource
from jquant.checkpoints.weights import Weights
from jquant.core import UserError
from jquant.evaluation.engines import LlamaCppEngine
from jquant.io import GgufSource
from jquant.models import ARCHITECTURES
from jquant.smoothquant import _balance as balance
from jquant.smoothquant import _smooth as smooth
from jquant.smoothquant import balance as balancing

TOKENS = np.random.default_rng(7).integers(3, 350, (1, 40)).astype(np.int32)
FEW = ("--samples", 6, "--sequence-length", 48)


def at_random(model: Model) -> dict[str, Factors]:
    """Factors of all places, those of norms too."""
    decoder, rng = model.decoder(), np.random.default_rng(0)
    found = {}
    for i, block in enumerate(decoder.blocks):
        scales = {
            c.name: jnp.asarray(np.exp(rng.standard_normal(c.shape)), jnp.float32)
            for c in smooth.couplings(block)
        }
        found |= {f"blk.{i}.{name}": f for name, f in smooth.factors_of(block, scales).items()}
    return found


@pytest.mark.parametrize("architecture", rows(ARCHITECTURES, {"LlamaForCausalLM", "Qwen2MoeForCausalLM"}))
def test_any_factors_leave_the_function_as_it_was(architecture, tmp_path):
    model = open_model(write_tiny(tmp_path, architecture))
    changed = model._replace(source=ScaledSource(model.source, at_random(model)))
    wanted, found = (logits(m.decoder(), TOKENS) for m in (model, changed))
    np.testing.assert_allclose(found, wanted, atol=2e-3, rtol=2e-3)
    values = ([Weights(m.source).tensor(name) for m in (model, changed)] for name in model.source.specs)
    assert sum(not np.array_equal(*pair) for pair in values) >= 0.6 * len(model.source.specs)


@pytest.mark.parametrize(
    "architecture",
    rows(("LlamaForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM"), {"MixtralForCausalLM"}),
)
def test_rows_are_those_of_the_whole_tensor(architecture, tmp_path):
    model = open_model(write_tiny(tmp_path, architecture))
    source = ScaledSource(model.source, at_random(model))
    for name, spec in source.specs.items():
        whole = source.read(name)
        assert whole.shape == (spec.rows, spec.row_bytes)
        for start in {0, spec.rows // 3, spec.rows - 1}:
            stop = min(start + 2, spec.rows)
            np.testing.assert_array_equal(source.read(name, start, stop), whole[start:stop])


def test_a_quantized_source_is_decoded_first(tmp_path):
    folder = write_tiny(tmp_path / "llama", "LlamaForCausalLM", **WIDE)
    factors, name = at_random(open_model(folder)), "blk.0.attn_q.weight"
    attempt("quantize", folder, tmp_path / "q8.gguf", "--type", "Q8_0", "-q")
    quantized = open_model(tmp_path / "q8.gguf").source
    found = Weights(ScaledSource(quantized, factors)).tensor(name)
    cols = np.asarray(factors[name.removesuffix(".weight")].cols)
    np.testing.assert_allclose(found, Weights(quantized).tensor(name) * cols, rtol=1e-6)


def rounded_by_ggml(x: np.ndarray) -> np.ndarray:
    """Blocks of Q8_K, but for the sign of the scale: d = max|x| / 127, q = round(x / d)."""
    blocks = x.reshape(-1, 256)
    d = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.round(blocks / np.where(d > 0, d, 1)) * d).reshape(x.shape)


def test_rounding_loses_what_the_noise_says():
    """The ratio for factors found, against rounding itself, on tokens that have not been seen."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.standard_normal(512))
    x = (rng.standard_normal((600, 512)) * sizes).astype(np.float32)
    w = (rng.standard_normal((96, 512)) / sizes**0.5).astype(np.float32)
    maxima, energies = balance.group_maxima(jnp.asarray(x)), balance.group_energies(jnp.sum(w * w, axis=0))
    weights = balance.token_weights(jnp.sum(x * x, axis=-1), jnp.ones(len(x)))
    found = balance.balance(maxima[:300], energies, weights[:300], span=4.0)
    s = np.repeat(np.exp(np.asarray(found.logs)), balance.GROUP)
    held, trust = x[300:], np.asarray(weights[300:])

    def lost(s):
        error = (rounded_by_ggml(held / s) - held / s) @ (w * s).T
        return np.sum(trust[:, None] * error**2)

    foreseen = float(found.after / found.before)
    assert foreseen < 0.9
    assert lost(s) / lost(np.ones(512)) == pytest.approx(foreseen, rel=0.05)
    assert np.abs(np.log(s)).max() <= np.log(4.0) + 1e-6


def test_nothing_to_see_leaves_factors_alone():
    zeros = balance.balance(jnp.zeros((4, 8)), jnp.ones(8), jnp.ones(4))
    np.testing.assert_array_equal(zeros.logs, 0)
    padding = balance.token_weights(jnp.asarray([4.0, jnp.nan, 0.0]), jnp.asarray([1.0, 0.0, 1.0]))
    assert np.isfinite(padding).all()
    assert padding[1] == 0


@pytest.fixture(scope="module")
def loud(tmp_path_factory) -> Path:
    """A model one of whose groups of inputs is ten times the others."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    return with_outliers(write_tiny(folder, "LlamaForCausalLM", **WIDE), 10.0, slice(32, 64))


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(LINES * 12))
    return file


@pytest.mark.parametrize(
    "architecture", rows(("LlamaForCausalLM", "MixtralForCausalLM"), {"LlamaForCausalLM"})
)
def test_an_imatrix_becomes_that_of_the_balanced_model(architecture, tmp_path):
    model = open_model(write_tiny(tmp_path, architecture, **WIDE))
    samples = calibration(model)
    balanced = balancing.balance_model(model, samples)
    before, wanted = (analyze.importance(m, samples) for m in (model, balanced.model))
    found = balanced.imatrix(before)
    assert found.entries.keys() == wanted.entries.keys()
    for name, entry in wanted.entries.items():
        np.testing.assert_allclose(found.entries[name], entry, rtol=1e-3, atol=1e-9)
    changed = {name for name in wanted.entries if not np.allclose(before.entries[name], wanted.entries[name])}
    assert "blk.0.attn_q.weight" in changed
    assert not any("output" in name or "down" in name or "embd" in name for name in changed)


@pytest.mark.parametrize("feedback", [(), pytest.param(("--feedback",), marks=pytest.mark.slow)], ids=str)
def test_llama_cpp_loses_less(loud, text, feedback, tmp_path):
    """Both files run in llama.cpp, which rounds inputs; the original is in float32."""
    options, reading = ["--type", "Q6_K", "--pure", "-q", *feedback], ["-c", text, *FEW]
    model = open_model(loud)
    wanted = by_llama_cpp(write_gguf(tmp_path / "original.gguf", model.metadata, model.source))
    lost, reports, sizes, recipes = [], [], [], []
    for name, more in {"plain": [], "balanced": ["--balance-inputs"]}.items():
        file = tmp_path / f"{name}.gguf"
        done = attempt(
            "quantize", loud, file, *options, *more, *(reading if feedback or more else []), "--json"
        )
        assert done.exit_code == 0, done.output
        reports.append(json.loads(done.stdout))
        lost.append(divergence(wanted, by_llama_cpp(file)))
        sizes.append(sum(spec.nbytes for spec in GgufSource(file).specs.values()))
        recipes.append(json.loads(str(GgufSource(file).metadata["jquant.recipe"])))
    assert lost[1] < 0.7 * lost[0]
    assert sizes[0] == sizes[1]
    assert [recipe.get("balanced", False) for recipe in recipes] == [False, True]
    assert "balance" not in reports[0]
    assert [place["name"] for place in reports[1]["balance"]][:2] == ["attn_norm", "ffn_norm"]
    assert all(place["kept"] < 0.8 for place in reports[1]["balance"])


def by_llama_cpp(file: Path) -> np.ndarray:
    with closing(LlamaCppEngine(file, threads=2)) as engine:
        return np.stack(list(engine.logits(list(TOKENS), [0] * len(TOKENS))))


def test_a_run_with_other_factors_does_not_continue_one(loud):
    model = open_model(loud)
    balanced = balancing.balance_model(model, calibration(model)).model
    assert common_facts(model) != common_facts(balanced)


@pytest.mark.slow
def test_what_was_measured_for_a_target_of_the_model_as_it_was_is_not_used_for_the_balanced_one(
    loud, text, tmp_path
):
    out, kept = tmp_path / "out.gguf", tmp_path / "kept.json"
    options = ["--target-bpw", 5, "-q", "--sensitivity", kept, "--force"]
    balance = ["--balance-inputs", "-c", text, *FEW]
    assert attempt("quantize", loud, out, *options, *balance).exit_code == 0
    assert attempt("quantize", loud, out, *options, *balance).exit_code == 0
    refused = attempt("quantize", loud, out, *options)
    assert refused.exit_code == 3
    assert kept.name in refused.output


def test_a_model_without_whole_blocks_is_said_to_have_nothing_to_gain(text, tmp_path):
    folder = write_tiny(tmp_path / "llama", "LlamaForCausalLM")
    done = attempt(
        "quantize", folder, tmp_path / "out.gguf", "--type", "Q8_0", "--balance-inputs", "-c", text, *FEW
    )
    assert done.exit_code == 0, done.output
    assert "nothing to balance" in done.output


def test_a_damaged_model_is_named(tmp_path):
    folder = write_tiny(tmp_path, "LlamaForCausalLM", **WIDE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][:] = np.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = open_model(folder)
    with pytest.raises(UserError, match=r"blk\.1"):
        balancing.balance_model(model, calibration(model))


def test_folders_have_other_means(loud, tmp_path):
    done = attempt("quantize", loud, tmp_path / "out", "--type", "W8A8", "--balance-inputs")
    assert done.exit_code == 2
    assert "--balance-inputs" in done.output
