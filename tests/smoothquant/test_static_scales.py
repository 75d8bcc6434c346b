"""`--static-activations`: one scale for all inputs of a matrix, against NumPy and the largest one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import forward
from helpers.decoders import logits
from helpers.divergence import divergence
from helpers.folders import FORMATS, config_of, decoded, read, run
from helpers.outliers import TOKENS, calibration, with_outliers
from helpers.shapes import GROUPED
from helpers.tables import rows
from helpers.tiny_models import LINES, open_tiny, write_tiny

from jquant.core import UserError
from jquant.evaluation.engines import FlaxEngine
from jquant.int8.rounding import LARGEST, STATIC_ROUNDINGS
from jquant.smoothquant import smoothing
from jquant.smoothquant import static_scales as input_scales
from jquant.writers.folder_plan import open_checkpoint

MODULES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return write_tiny(folder, "LlamaForCausalLM", torch_dtype="bfloat16", **GROUPED)


@pytest.fixture
def calibrated(tmp_path) -> list[object]:
    """Options of a command that calibrates."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(LINES * 12))
    return ["--static-activations", "-c", file, "--samples", "6", "--sequence-length", "48", "-q"]


def scales(folder: Path) -> dict[str, np.ndarray]:
    return {name: t for name, t in read(folder).items() if name.endswith("input_scale")}


@pytest.mark.parametrize("scheme", rows(("W8A8", "FP8"), {"FP8"}))
def test_each_matrix_has_a_scale_and_those_of_one_input_the_same(model, calibrated, scheme, tmp_path):
    run(model, tmp_path / "out", "--type", scheme, *calibrated)
    stored = scales(tmp_path / "out")
    assert len(stored) == 14
    for value in stored.values():
        assert value.shape == (1,)
        assert value.dtype == ml_dtypes.bfloat16
    for i in range(2):
        names = [[f"model.layers.{i}.{part}.{m}.input_scale" for m in MODULES[part]] for part in MODULES]
        (q, k, v, o), (gate, up, down) = ([float(stored[n][0]) for n in part] for part in names)
        assert q == k == v
        assert gate == up
        assert len({q, o, gate, down}) == 4
    (group,) = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert (
        group["input_activations"].items() >= {"strategy": "tensor", "dynamic": False, "num_bits": 8}.items()
    )


ROUND = {
    "W8A8": lambda x, s: np.clip(np.rint(x / s), -128, 127) * s,
    "FP8": lambda x, s: np.clip(x / s, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * s,
}


@pytest.mark.parametrize("scheme", ROUND)
@pytest.mark.parametrize(
    "architecture", rows(("LlamaForCausalLM", "Phi3ForCausalLM", "Qwen2MoeForCausalLM"), {"LlamaForCausalLM"})
)
def test_the_engine_computes_what_the_folder_declares(
    architecture, scheme, calibrated, tmp_path, monkeypatch
):
    folder, out = write_tiny(tmp_path / "in", architecture), tmp_path / "out"
    run(folder, out, "--type", scheme, *calibrated, *(["--no-smooth"] if scheme == "W8A8" else []))
    linear = forward.linear

    def rounded(p, name, x):
        fused = re.sub(r"\.[qkv]_proj$", ".qkv_proj", name)
        scale = p.get(f"{name}.input_scale", p.get(f"{fused}.input_scale"))  # routers have none
        return linear(p, name, x if scale is None else ROUND[scheme](x, float(scale[0])))

    monkeypatch.setattr(forward, "linear", rounded)
    tokens = np.random.default_rng(7).integers(3, 350, 40).astype(np.int32)
    (found,) = FlaxEngine(out).logits([tokens], [0])
    tensors = decoded(out, FORMATS[scheme]) | scales(out)
    wanted = forward.logits(config_of(folder), tensors, tokens.tolist())[:-1]
    monkeypatch.undo()
    exact = forward.logits(config_of(folder), open_tiny(folder).tensors, tokens.tolist())[:-1]
    assert divergence(wanted, found) < 0.1 * divergence(exact, found)


def test_a_scale_clips_where_the_output_of_the_block_gains_by_it(model):
    """Never beyond the largest input seen, and better than where nothing is clipped."""
    checkpoint = open_checkpoint(model)
    samples, decoder = calibration(checkpoint.model), checkpoint.model.decoder()
    stats = smoothing.measure(checkpoint.model, samples)
    dtypes = dict.fromkeys(stats, np.dtype(np.float32))
    found = input_scales.calibrate(decoder, samples, stats, dtypes, "int8")
    largest = {n: np.float32(np.max(s["absmax"]) / LARGEST["int8"]) for n, s in stats.items()}
    ratios = np.array([found[name] / largest[name] for name in stats])
    assert ratios.max() <= 1.001
    x, angles = jnp.asarray(decoder.embed(samples.tokens[:4, :48])), jnp.asarray(decoder.angles(0, 48))

    def error(scales) -> float:
        given = {name: np.asarray(scale) for name, scale in scales.items()}
        rounding = decoder.rounded(STATIC_ROUNDINGS["int8"], stats, given)
        y, exact = (d.blocks[0].apply({"params": d.load_block(0)}, x, angles) for d in (rounding, decoder))
        return float(jnp.mean(jnp.sum((y - exact) ** 2, -1) / jnp.sum(exact**2, -1)))

    assert error(found) < error(largest)


def test_smoothing_comes_before_the_scale(model, calibrated, tmp_path):
    """Outliers take a scale for all tokens away from the other channels; smoothing gives it back."""
    with_outliers(write_tiny(tmp_path / "in", "LlamaForCausalLM", **GROUPED))
    for name, options in {"plain": ["--no-smooth"], "smooth": ["--alpha", "0.5"]}.items():
        run(tmp_path / "in", tmp_path / name, "--type", "W8A8", *options, *calibrated)
    wanted = logits(open_checkpoint(tmp_path / "in").model.decoder(), TOKENS)[:, :-1]
    plain, smooth = (
        divergence(wanted, np.stack(list(FlaxEngine(tmp_path / name).logits(list(TOKENS), [0] * 3))))
        for name in ("plain", "smooth")
    )
    assert smooth < plain / 20


def test_what_is_missing_or_no_scale_is_named(model, calibrated, tmp_path):
    from safetensors.numpy import load_file, save_file

    out = tmp_path / "out"
    run(
        write_tiny(tmp_path / "in", "LlamaForCausalLM", **GROUPED),
        out,
        "--type",
        "W8A8",
        "--no-smooth",
        *calibrated,
    )
    tensors, name = load_file(out / "model.safetensors"), "model.layers.1.mlp.up_proj.input_scale"
    for broken, said in ((np.array([np.nan], np.float32), "is nan"), (None, "is not there")):
        rest = {n: t for n, t in tensors.items() if n != name}
        save_file(rest if broken is None else {**rest, name: broken}, out / "model.safetensors")
        with pytest.raises(UserError, match=rf"{name}: .*{said}"):
            FlaxEngine(out)
    decoder = open_checkpoint(model).model.decoder()
    samples = calibration(open_checkpoint(model).model)
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight: nothing is known of its inputs"):
        input_scales.calibrate(decoder, samples, {}, {"blk.0.attn_q.weight": np.dtype(np.float32)}, "int8")


def test_other_types_have_no_use_for_it(model, tmp_path):
    for type in ("W4A16", "Q8_0"):
        assert "static" in run(model, tmp_path / "out", "--type", type, "--static-activations", code=2)


def test_the_report_says_so(model, calibrated, tmp_path):
    report = json.loads(run(model, tmp_path / "out", "--type", "FP8", "--json", *calibrated))
    assert report["static_activations"] is True
