"""Folders with error feedback: the search around a ScaledFormat, and the folder that comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import logits, opened
from helpers.folders import decoded
from helpers.matrices import hessian, matrix, output_error
from helpers.tables import rows
from helpers.text import TEXT
from helpers.tiny_models import write_tiny
from typer.testing import CliRunner

from jquant import SCALED_FORMATS, QuantizedTensor, dequantize, models, quantize
from jquant.calibration import load_samples
from jquant.checkpoints.model import open_model
from jquant.checkpoints.schemes import SCHEMES
from jquant.checkpoints.weights import Weights
from jquant.ldlq import sequential
from jquant.ldlq.ldlq import factor, feedback
from jquant.ldlq.scaled import by_groups
from jquant.text.samples import Samples
from jquant.writers.folder import Ingredients, write_folder
from jquant.writers.folder_feedback import feed_back
from jquant.writers.folder_plan import Checkpoint, FolderPlan, open_checkpoint, plan_folder
from jquant.writers.gguf_feedback import Feedback
from jquant.writers.w8a8 import smooth_model
from jquant_cli.main import app

INT4 = SCALED_FORMATS["INT4"]
BFLOAT16 = {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("name", rows(("INT4", "UINT4", "INT8", "FP8"), {"INT8"}))
def test_the_output_is_nearer_than_with_importance_alone(name):
    W, H, format = matrix(32, 512), hessian(512), SCALED_FORMATS[name]
    fed = feedback(W, factor(H, 1), by_groups(format, 512))
    plain = quantize(W, format, jnp.asarray(np.diagonal(H)))
    assert output_error(W, fed, H) < 0.7 * output_error(W, plain, H)


@pytest.mark.parametrize("stretch", [96, pytest.param(512, marks=pytest.mark.every)])
def test_a_row_that_is_one_block_is_fed_back_in_stretches_of_any_length(stretch, monkeypatch):
    W, H, format = matrix(32, 512), hessian(512), by_groups(SCALED_FORMATS["INT8"], 512)
    made = dequantize(feedback(W, factor(H, 1), format))
    monkeypatch.setattr("jquant.ldlq.ldlq.STRETCH", stretch)
    other = dequantize(feedback(W, factor(H, 1), replace(format, name="another")))
    # A last digit that differs is a rounding that goes the other way now and then, and is fed on.
    assert np.mean(np.abs(np.asarray(made) - np.asarray(other)) > 1e-6) < 0.01


def test_groups_are_the_blocks_that_they_are_without_feedback():
    W, format = matrix(16, 256), by_groups(INT4, 256)
    plain, grouped = quantize(W, INT4), quantize(W, format)
    np.testing.assert_array_equal(dequantize(grouped), dequantize(plain))
    np.testing.assert_array_equal(
        QuantizedTensor(grouped.parts, format).parts["blocks"].reshape(16, 2, 132)[..., :128].view(jnp.int8),
        INT4.unpack(plain.parts["weight_packed"]).reshape(16, 2, 128),
    )


def planned(folder: Path, name: str, scheme: str, samples: int) -> tuple[Checkpoint, Samples, FolderPlan]:
    write_tiny(folder, name, **BFLOAT16)
    checkpoint = open_checkpoint(folder)
    text = load_samples(checkpoint.model, TEXT, samples=samples, sequence_length=32)
    return checkpoint, text, plan_folder(checkpoint, SCHEMES[scheme])


@pytest.mark.parametrize(
    "name", rows(("LlamaForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"), {"LlamaForCausalLM"})
)
def test_the_folder_has_what_the_blocks_were_given(tmp_path, name):
    """Rows in the checkpoint's order, experts apart: read back by NumPy, then as the GGUF view has them."""
    checkpoint, samples, plan = planned(tmp_path / "model", name, "W4A16", samples=6)
    fed = list(feed_back(checkpoint, plan, Feedback(samples)))
    assert sorted(one.name for one in fed) == sorted(plan.quantized)
    written = write_folder(checkpoint, plan, tmp_path / "out", fed=fed)
    assert written.errors.keys() == set(plan.quantized)
    weights = decoded(tmp_path / "out", "INT4")
    for one in fed:
        np.testing.assert_allclose(weights[one.name], dequantize(one.quantized), rtol=1e-6)

    matrices = {n: w for n, w in checkpoint.weights.items() if set(w.parts) <= set(plan.quantized)}
    specs, own = checkpoint.model.source.specs, fed[0].quantized.format
    formats = {n: by_groups(own, specs[n].cols) for n in matrices}
    decoder = models.decoder(Weights(checkpoint.model.source), checkpoint.model.metadata)
    direct = sequential.feed_back(decoder, samples.tokens, formats)
    view = Weights(open_model(tmp_path / "out").source)
    for block in direct:
        for n, made in block.items():
            q = QuantizedTensor({"blocks": jnp.asarray(made.data)}, formats[n])
            np.testing.assert_array_equal(view.rows(n), dequantize(q))


@pytest.mark.parametrize("scheme", rows(("W4A16", "W8A8", "FP8"), {"W4A16"}))
def test_the_command_says_how_far_the_output_of_each_layer_is(tmp_path, scheme):
    write_tiny(tmp_path / "model", "LlamaForCausalLM", **BFLOAT16)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    text = ["-c", str(tmp_path / "text.txt"), "--samples", "6", "--sequence-length", "32"]
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--type", scheme, *text]
    done = CliRunner().invoke(app, [*command, "--feedback"])
    assert done.exit_code == 0, done.output
    assert "block 2 of 2" in done.stderr
    assert open_model(tmp_path / "out").source.specs


@pytest.mark.parametrize(
    "name",
    rows(
        ("LlamaForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM", "Qwen2MoeForCausalLM"),
        {"LlamaForCausalLM"},
    ),
)
def test_smoothed_weights_are_fed_back_to_a_model_nearer_the_original(tmp_path, name):
    checkpoint, samples, plan = planned(tmp_path / "model", name, "W8A8", samples=16)
    made = smooth_model(checkpoint, plan, samples, 0.5)
    fed = feed_back(checkpoint, plan, Feedback(samples), made.factors)
    write_folder(checkpoint, plan, tmp_path / "fed", Ingredients(made.factors), fed=fed)
    write_folder(checkpoint, plan, tmp_path / "plain", Ingredients(made.factors, made.importance))
    wanted, *found = (logits(opened(tmp_path / which), samples.tokens) for which in ("model", "fed", "plain"))
    near, far = (float(np.mean(np.square(one - wanted))) for one in found)
    assert 0 < near < 0.8 * far
