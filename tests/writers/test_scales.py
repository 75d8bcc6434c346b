"""`--export-scales` and `--target-error`, judged by the folder that is written and the block's own output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.folders import FORMATS, decoded, read, run
from helpers.outliers import with_outliers
from helpers.shapes import GROUPED
from helpers.tiny_models import LINES, open_tiny, write_tiny
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return with_outliers(write_tiny(folder, "LlamaForCausalLM", **GROUPED))


@pytest.fixture
def calibrated(tmp_path) -> list[object]:
    """Options of a command that smooths with one alpha."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(LINES * 12))
    return ["--type", "W8A8", "--alpha", "0.5", "-c", file, "--samples", "6", "--sequence-length", "48", "-q"]


def test_factors_and_scales_rebuild_the_folder(model, calibrated, tmp_path):
    file = tmp_path / "scales.safetensors"
    run(model, tmp_path / "out", *calibrated, "--export-scales", file, "--static-activations")
    found, before, after = load_file(file), open_tiny(model).tensors, read(tmp_path / "out")
    weights = decoded(tmp_path / "out", FORMATS["W8A8"])
    for i in range(2):
        norm, q = f"model.layers.{i}.input_layernorm", f"model.layers.{i}.self_attn.q_proj"
        s = found[f"{q}.smoothing"]
        np.testing.assert_allclose(after[f"{norm}.weight"] * s, before[f"{norm}.weight"], rtol=1e-5)
        assert (
            np.abs(weights[f"{q}.weight"] / s - before[f"{q}.weight"]).max()
            < 0.01 * np.abs(before[f"{q}.weight"]).max()
        )
        np.testing.assert_array_equal(found[f"{q}.weight_scale"], after[f"{q}.weight_scale"])
        np.testing.assert_array_equal(found[f"{q}.input_scale"], after[f"{q}.input_scale"])
        absmax = found[f"{q}.input_absmax"]
        assert absmax[3:6].min() > 20 * np.median(absmax)  # the outliers that were planted
        assert found[f"{q}.input_scale"] <= 1.001 * (absmax / s).max() / 127.5
    assert all(t.dtype == np.float32 for t in found.values())
    assert len(found) == 4 * 14


@pytest.mark.parametrize("type", ["W4A16", pytest.param("GPTQ", marks=pytest.mark.every)])
def test_without_calibration_there_are_scales_of_weights(model, type, tmp_path):
    file = tmp_path / "scales.safetensors"
    run(model, tmp_path / "out", "--type", type, "-q", "--export-scales", file)
    found = load_file(file)
    assert len(found) == 14
    assert found["model.layers.0.mlp.down_proj.weight_scale"].shape == (128, 2)
    run(model, tmp_path / "out", "--type", type, "-q", "--export-scales", file, "--force")
    output = run(model, tmp_path / "more", "--type", type, "-q", "--export-scales", file, code=4)
    assert "scales.safetensors: exists" in " ".join(output.split())
    assert not (tmp_path / "more").exists()


def test_a_target_that_is_missed_has_an_exit_code_and_names_the_worst_block(model, calibrated, tmp_path):
    report = json.loads(run(model, tmp_path / "out", *calibrated, "--json", "--target-error", "1"))
    assert report["target_error"] == {"target": 1.0, "reached": True}
    errors = [row["smoothed_block_error"] for row in report["smoothing"]]
    assert 0 < max(errors) < min(row["block_error"] for row in report["smoothing"])
    between = (min(errors) + max(errors)) / 2
    output = run(model, tmp_path / "missed", *calibrated, "--target-error", between, code=6)
    worst = report["smoothing"][int(np.argmax(errors))]["block"]
    said = " ".join(output.split())
    assert (
        f"1 of 2 blocks above --target-error {between:g}, block {worst} the most: {max(errors):.2e}" in said
    )
    assert (tmp_path / "missed/config.json").is_file()


def test_they_are_refused_where_they_say_nothing(model, tmp_path):
    for options in (["--type", "W8A8", "--no-smooth"], ["--type", "FP8"], ["--type", "Q8_0"]):
        run(model, tmp_path / "out", *options, "--target-error", "0.1", code=2)
    run(model, tmp_path / "out", "--type", "Q8_0", "--export-scales", tmp_path / "s", code=2)
