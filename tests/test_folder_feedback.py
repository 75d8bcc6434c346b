"""4 bits with error feedback: the search around a ScaledFormat, and the folder that comes of it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from test_feedback import TEXT, hessian, matrix, output_error
from test_folders import decoded
from tiny_models import write_tiny
from typer.testing import CliRunner

from jquant import SCALED_FORMATS, QuantizedTensor, dequantize, models, quantize, sequential
from jquant.analyze import load_samples
from jquant.convert import open_model
from jquant.fitting import Feedback
from jquant.folder_feedback import by_groups, feed_back
from jquant.folders import open_checkpoint, plan_folder, write_folder
from jquant.schemes import SCHEMES
from jquant.transforms.feedback import factor, feedback
from jquant.weights import Weights
from jquant_cli.main import app

INT4 = SCALED_FORMATS["INT4"]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("format", [INT4, SCALED_FORMATS["UINT4"]], ids=str)
def test_the_output_is_nearer_than_with_importance_alone(format):
    W, H = matrix(32, 512), hessian(512)
    fed = feedback(W, factor(H, 1), by_groups(format))
    plain = quantize(W, format, jnp.diagonal(H))
    assert output_error(W, fed, H) < 0.7 * output_error(W, plain, H)


def test_groups_are_the_blocks_that_they_are_without_feedback():
    W, format = matrix(16, 256), by_groups(INT4)
    plain, grouped = quantize(W, INT4), quantize(W, format)
    np.testing.assert_array_equal(dequantize(grouped), dequantize(plain))
    np.testing.assert_array_equal(
        QuantizedTensor(grouped.parts, format).parts["blocks"].reshape(16, 2, 132)[..., :128].view(jnp.int8),
        INT4.unpack(plain.parts["weight_packed"]).reshape(16, 2, 128),
    )


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"])
def test_the_folder_has_what_the_blocks_were_given(tmp_path, name):
    """Rows in the checkpoint's order, experts apart: read back by NumPy, then as the GGUF view has them."""
    write_tiny(tmp_path / "model", name, **WIDE)
    checkpoint = open_checkpoint(tmp_path / "model")
    samples = load_samples(checkpoint.model, TEXT, samples=6, sequence_length=64)
    plan = plan_folder(checkpoint, SCHEMES["W4A16"])
    fed = list(feed_back(checkpoint, plan, Feedback(samples)))
    assert sorted(one.name for one in fed) == sorted(plan.quantized)
    written = write_folder(checkpoint, plan, tmp_path / "out", fed=fed)
    assert written.errors.keys() == set(plan.quantized)
    weights = decoded(tmp_path / "out", "INT4")
    for one in fed:
        np.testing.assert_allclose(weights[one.name], dequantize(one.quantized), rtol=1e-6)

    matrices = {n: w for n, w in checkpoint.weights.items() if set(w.parts) <= set(plan.quantized)}
    direct = sequential.feed_back(
        models.decoder(Weights(checkpoint.model.source), checkpoint.model.metadata),
        samples.tokens,
        {n: by_groups(fed[0].quantized.format) for n in matrices},
    )
    view = Weights(open_model(tmp_path / "out").source)
    for block in direct:
        for n, made in block.items():
            q = QuantizedTensor({"blocks": jnp.asarray(made.data)}, by_groups(fed[0].quantized.format))
            np.testing.assert_array_equal(view.rows(n), dequantize(q))


def test_the_command_says_how_far_the_output_of_each_layer_is(tmp_path):
    write_tiny(tmp_path / "model", "LlamaForCausalLM", **WIDE)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    text = ["-c", str(tmp_path / "text.txt"), "--samples", "6", "--sequence-length", "64"]
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--type", "W4A16", *text]
    done = CliRunner().invoke(app, [*command, "--feedback"])
    assert done.exit_code == 0, done.output
    assert "block 2 of 2" in done.stderr
    done = CliRunner().invoke(
        app, [*command[:3], str(tmp_path / "fp8"), "--type", "FP8", *text, "--feedback"]
    )
    assert done.exit_code == 2
