"""GPTQ's and AWQ's layouts, decoded by plain NumPy as the kernels' own references do it.

What loads such folders needs Torch, so what is published is written down here again: dequantization of GPTQ
as in AutoGPTQ's QuantLinear.forward, of AWQ as in vLLM's awq_dequantize_torch. A program's own code reads AWQ
in test_interop.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import tables
from helpers.folders import config_of, read, run
from helpers.shapes import GROUPED
from helpers.text import TEXT
from helpers.tiny_models import open_tiny, write_tiny
from safetensors.numpy import save_file

from jquant import dequantize
from jquant.calibration import load_samples
from jquant.checkpoints.gptq_awq import Transposed
from jquant.checkpoints.model import open_model
from jquant.checkpoints.schemes import SCHEMES, layout_of
from jquant.checkpoints.weights import Weights
from jquant.core import UserError
from jquant.evaluation.engines import FlaxEngine
from jquant.io import GgufSource, SafetensorsSource
from jquant.writers.folder import write_folder
from jquant.writers.folder_feedback import feed_back
from jquant.writers.folder_plan import open_checkpoint, plan_folder
from jquant.writers.gguf_feedback import Feedback

LAYOUTS = ("GPTQ", "AWQ")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
one_layout = pytest.mark.parametrize("layout", tables.rows(LAYOUTS, {"AWQ"}))
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return write_tiny(folder, "LlamaForCausalLM", torch_dtype="bfloat16", **GROUPED)


def bits(words: np.ndarray, axis: int) -> np.ndarray:
    """Each int32 as eight 4-bit numbers along a new axis behind `axis`, the lowest first."""
    return np.stack([(words.view(np.uint32) >> np.uint32(4 * i)) & 15 for i in range(8)], axis + 1)


def gptq(t: dict[str, np.ndarray], module: str, offset: int = 1) -> np.ndarray:
    """[out, in]: scales[g_idx] · (weight − (zeros + 1)), the +1 in the format's first version only."""
    words, zeros, scales, g_idx = (t[f"{module}.{n}"] for n in ("qweight", "qzeros", "scales", "g_idx"))
    weight = bits(words, 0).reshape(-1, words.shape[1]).astype(np.float64)
    zeros = bits(zeros, 1).reshape(scales.shape).astype(np.float64) + offset
    return (scales.astype(np.float64)[g_idx] * (weight - zeros[g_idx])).T


def awq(t: dict[str, np.ndarray], module: str) -> np.ndarray:
    """[out, in]: columns of each eight put back by the reverse order 0, 4, 1, 5, 2, 6, 3, 7."""
    words, zeros, scales = (t[f"{module}.{n}"] for n in ("qweight", "qzeros", "scales"))
    reverse = np.arange(scales.shape[1]).reshape(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1)
    weight, zeros = (bits(a, 1).reshape(len(a), -1)[:, reverse].astype(np.float64) for a in (words, zeros))
    group = np.arange(len(weight)) // (len(weight) // len(scales))
    return ((weight - zeros[group]) * scales.astype(np.float64)[group]).T


ORACLES = {"GPTQ": gptq, "AWQ": awq}


def modules(tensors: dict[str, np.ndarray]) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


@every_layout
def test_the_published_decoding_gives_weights_near_the_original(model, layout, tmp_path):
    run(model, tmp_path / "out", "--type", layout, "-q")
    before, after = read(model), read(tmp_path / "out")
    assert len(modules(after)) == 14
    for name, x in before.items():
        if "_proj" not in name:
            np.testing.assert_array_equal(after[name].view(np.uint16), x.view(np.uint16), err_msg=name)
            continue
        x = x.astype(np.float64)
        lost = np.sum((ORACLES[layout](after, name.removesuffix(".weight")) - x) ** 2) / np.sum(x**2)
        assert 0.002 < lost < 0.012, name  # 16 levels of a Gaussian lose 1.1%
    q = {part: after[f"{Q_PROJ}.{part}"] for part in ("qweight", "qzeros", "scales")}
    shapes = {"GPTQ": (16, 128), "AWQ": (128, 16)}
    assert (q["qweight"].shape, q["qweight"].dtype) == (shapes[layout], np.int32)
    assert (q["qzeros"].shape, q["scales"].shape, q["scales"].dtype) == ((1, 16), (1, 128), np.float16)
    if layout == "GPTQ":
        assert (q["qzeros"].view(np.uint32) == 0x77777777).all()  # the middle, 8, less 1
        assert after[f"{Q_PROJ}.g_idx"].tolist() == [0] * 128


@one_layout
@pytest.mark.parametrize(
    "architecture",
    tables.rows(["LlamaForCausalLM", "Phi3ForCausalLM", "Qwen2MoeForCausalLM"], {"Phi3ForCausalLM"}),
)
def test_what_is_read_back_is_what_the_oracle_decodes(architecture, layout, tmp_path):
    wide = {"moe_intermediate_size": 96} if "Moe" in architecture else {}
    wide |= {"shared_expert_intermediate_size": 96} if "Moe" in architecture else {}
    folder, out = write_tiny(tmp_path / "in", architecture, **wide), tmp_path / "out"
    run(folder, out, "--type", layout, "-q")
    tensors, source = read(out), SafetensorsSource(out)
    view = Transposed(source, layout_of(config_of(out)["quantization_config"]))
    assert view.decoded == {f"{m}.weight" for m in modules(tensors)}
    for module in modules(tensors):
        wanted = ORACLES[layout](tensors, module)
        found = view.read(f"{module}.weight").view(np.float32)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        np.testing.assert_array_equal(view.read(f"{module}.weight", 5, 29).view(np.float32), found[5:29])
    assert Weights(open_model(out).source).tensor("blk.0.attn_output.weight").shape == (64, 64)


@one_layout
def test_the_engine_runs_such_a_folder_and_it_can_be_quantized_again(model, layout, tmp_path):
    run(model, tmp_path / "out", "--type", layout, "-q")
    tokens = np.random.default_rng(7).integers(3, 350, 40).astype(np.int32)
    found, exact = (next(iter(FlaxEngine(p).logits([tokens], [0]))) for p in (tmp_path / "out", model))
    assert 0 < np.mean((found - exact) ** 2) < 0.4 * np.mean(exact**2)
    run(tmp_path / "out", tmp_path / "again.gguf", "--type", "F32", "-q")
    name = "blk.1.ffn_down.weight"
    stored = GgufSource(tmp_path / "again.gguf").read(name).view(np.float32)
    np.testing.assert_allclose(
        stored, ORACLES[layout](read(tmp_path / "out"), "model.layers.1.mlp.down_proj"), rtol=1e-6
    )
    assert "quantized already" in run(tmp_path / "out", tmp_path / "no", "--type", "W4A16", "-q", code=3)


def test_zeros_make_less_error_than_the_middle(tmp_path):
    """Weights to one side of zero."""
    folder = write_tiny(tmp_path / "in", "LlamaForCausalLM", **GROUPED)
    tensors = open_tiny(folder).tensors
    x = tensors[f"{Q_PROJ}.weight"] = np.abs(tensors[f"{Q_PROJ}.weight"])
    save_file(tensors, folder / "model.safetensors")
    lost = {}
    for layout in LAYOUTS:
        run(folder, tmp_path / layout, "--type", layout, "-q")
        lost[layout] = np.sum((ORACLES[layout](read(tmp_path / layout), Q_PROJ) - x) ** 2)
    assert lost["AWQ"] < 0.5 * lost["GPTQ"]


@pytest.mark.every
@every_layout
def test_what_feedback_makes_is_what_the_folder_holds(layout, tmp_path):
    checkpoint = open_checkpoint(write_tiny(tmp_path / "in", "LlamaForCausalLM", **GROUPED))
    samples = load_samples(checkpoint.model, TEXT, samples=6, sequence_length=48)
    plan = plan_folder(checkpoint, SCHEMES[layout])
    fed = list(feed_back(checkpoint, plan, Feedback(samples)))
    assert sorted(one.name for one in fed) == sorted(plan.quantized)
    written = write_folder(checkpoint, plan, tmp_path / "out", fed=fed)
    tensors = read(tmp_path / "out")
    for one in fed:
        wanted = ORACLES[layout](tensors, one.name.removesuffix(".weight"))
        np.testing.assert_allclose(dequantize(one.quantized), wanted, rtol=1e-6)
        assert written.errors[one.name] == one.error < 0.02


def test_config_json_declares_what_runtimes_read(model, tmp_path):
    keep = ["--keep", r"layers\.0\..*down_proj", "-q"]
    kept = "model.layers.0.mlp.down_proj"
    for layout in LAYOUTS:
        run(model, tmp_path / layout, "--type", layout, *keep)
        assert f"{kept}.weight" in read(tmp_path / layout)
    declared = {layout: config_of(tmp_path / layout)["quantization_config"] for layout in LAYOUTS}
    common = {"bits": 4, "group_size": 128}
    assert declared["GPTQ"].items() >= {
        **common, "quant_method": "gptq", "sym": True, "desc_act": False, "checkpoint_format": "gptq",
        "dynamic": {r"-:^model\.layers\.0\.mlp\.down_proj$": {}},
    }.items()  # fmt: skip
    assert declared["AWQ"] == {
        **common, "quant_method": "awq", "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head", kept],
    }  # fmt: skip
    FlaxEngine(tmp_path / "GPTQ")


def test_other_orders_of_inputs_and_the_second_version_are_read(model, tmp_path):
    """desc_act, where g_idx sends inputs to groups in any order, and zeros that are stored as they are."""
    out = tmp_path / "out"
    run(write_tiny(tmp_path / "in", "LlamaForCausalLM", **GROUPED), out, "--type", "GPTQ", "-q")
    module, tensors = "model.layers.0.mlp.down_proj", read(out)  # two groups
    tensors[f"{module}.g_idx"] = np.random.default_rng(0).permutation(tensors[f"{module}.g_idx"])
    save_file(tensors, out / "model.safetensors")
    config = config_of(out)
    for version, offset in (("gptq", 1), ("gptq_v2", 0)):
        config["quantization_config"] |= {"desc_act": True, "checkpoint_format": version}
        (out / "config.json").write_text(json.dumps(config))
        found = Weights(open_model(out).source).tensor("blk.0.ffn_down.weight")
        np.testing.assert_allclose(found, gptq(tensors, module, offset), rtol=1e-6)


DAMAGED = {
    "bits": ({"bits": 3}, None, "3 bits"),
    "version": ({"checkpoint_format": "marlin"}, None, "'marlin'"),
    "mixture": ({"dynamic": {"+:.*": {"bits": 8}}}, None, "a mixture"),
    "missing": ({}, ("qzeros", None), "qzeros: is missing"),
    "shape": ({}, ("scales", np.ones((2, 128), np.float16)), r"scales: is F16 \(2, 128\)"),
    "groups": ({}, ("g_idx", np.full(128, 7, np.int32)), "names groups beyond 1"),
}  # fmt: skip


@pytest.mark.parametrize(("declared", "tensor", "said"), DAMAGED.values(), ids=DAMAGED)
def test_what_cannot_be_read_is_said(model, declared, tensor, said, tmp_path):
    out = tmp_path / "out"
    run(write_tiny(tmp_path / "in", "LlamaForCausalLM", **GROUPED), out, "--type", "GPTQ", "-q")
    config, tensors = config_of(out), read(out)
    config["quantization_config"] |= declared
    (out / "config.json").write_text(json.dumps(config))
    if tensor is not None:
        del tensors[f"{Q_PROJ}.{tensor[0]}"]
        tensors |= {} if tensor[1] is None else {f"{Q_PROJ}.{tensor[0]}": tensor[1]}
        save_file(tensors, out / "model.safetensors")
    with pytest.raises(UserError, match=said):
        Weights(open_model(out).source).tensor("blk.1.attn_q.weight")


def test_outputs_that_are_no_whole_words_are_refused(tmp_path):
    folder = write_tiny(tmp_path / "in", "LlamaForCausalLM", intermediate_size=100)
    for layout in LAYOUTS:
        output = run(folder, tmp_path / "out", "--type", layout, "-q", "--keep", "down_proj", code=3)
        assert f"{layout} needs a multiple of 8 outputs; got 100" in output
