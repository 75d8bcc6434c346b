"""`jquant quantize --type W8A8` and its like, judged by safetensors and a forward pass in float64."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import forward
from helpers.divergence import divergence
from helpers.folders import FORMATS, config_of, decoded, read, run
from helpers.gguf_files import imatrix_file
from helpers.shapes import GROUPED
from helpers.tables import rows
from helpers.tiny_models import DTYPES, open_tiny, write_tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jquant import SCALED_FORMATS, QuantizedTensor, dequantize, quantize
from jquant.checkpoints.rescaled import Factors
from jquant.checkpoints.schemes import SCHEMES
from jquant.core import OutputError
from jquant.evaluation.engines import FlaxEngine
from jquant.models import ARCHITECTURES
from jquant.writers.folder import Ingredients, write_folder
from jquant.writers.folder_plan import open_checkpoint, plan_folder

every_scheme = pytest.mark.parametrize("scheme", FORMATS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return write_tiny(folder, "LlamaForCausalLM", torch_dtype="bfloat16", **GROUPED)


@every_scheme
def test_the_folder_holds_what_quantize_gives_and_the_rest_as_it_was(model, tmp_path, scheme):
    run(model, tmp_path / "out", "--type", scheme, "-q")
    before, after = read(model), decoded(tmp_path / "out", FORMATS[scheme])
    assert before.keys() == after.keys()
    for name, x in before.items():
        if "_proj" not in name:
            np.testing.assert_array_equal(after[name].view(np.uint16), x.view(np.uint16), err_msg=name)
            continue
        # Of a Gaussian's variance 16 levels lose 1.1%, one eighth of a float's octave loses 0.07%.
        lost = np.sum((after[name] - x.astype(np.float64)) ** 2) / np.sum(x.astype(np.float64) ** 2)
        assert 0 < lost < {"W8A8": 1e-4, "FP8": 1e-3, "W4A16": 1.2e-2}[scheme], name
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (model / file).read_bytes()


def test_config_json_declares_what_compressed_tensors_reads(model, tmp_path):
    run(model, tmp_path / "out", "--type", "w8a8", "-q")
    config = config_of(tmp_path / "out")
    declared = config.pop("quantization_config")
    assert config == config_of(model)
    assert declared["quant_method"] == "compressed-tensors"
    assert declared["format"] == "int-quantized"
    assert declared["ignore"] == ["lm_head"]
    (group,) = declared["config_groups"].values()
    assert group["targets"] == ["Linear"]
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    assert group["weights"].items() >= {**kind, "strategy": "channel", "dynamic": False}.items()
    assert group["input_activations"] == {**kind, "strategy": "token", "dynamic": True}
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("scheme", rows(FORMATS, {"FP8"}))
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_have_the_type_of_the_weights(tmp_path, scheme, dtype):
    folder = write_tiny(tmp_path / "in", "LlamaForCausalLM", torch_dtype=dtype, **GROUPED)
    run(folder, tmp_path / "out", "--type", scheme, "-q")
    scales = [t.dtype for name, t in read(tmp_path / "out").items() if name.endswith("_scale")]
    assert len(scales) == 14
    assert set(scales) == {np.dtype(DTYPES[dtype])}


def with_a_zero(x: np.ndarray) -> np.ndarray:
    least, most = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    s = np.where(most > least, (most - least) / 255, 1)
    zero = np.rint(-128 - least / s)
    return (np.clip(np.rint(x / s + zero), -128, 127) - zero) * s


ROUND = {
    "W8A8": lambda x, s: np.clip(np.rint(x / (s / 127.5)), -128, 127) * (s / 127.5),
    "FP8": lambda x, s: (x / (s / 448)).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * (s / 448),
    "W4A16": lambda x, s: x,
}


# A dense model in every scheme; every architecture once and a sparse one in every scheme.
SCHEME_OPTIONS = [("FP8", ()), ("W8A8", ()), ("W8A8", ("--asymmetric-activations",)), ("W4A16", ())]
COMPUTED = [("LlamaForCausalLM", *given) for given in SCHEME_OPTIONS]
COMPUTED += [
    pytest.param(name, *given, marks=pytest.mark.every)
    for name in ARCHITECTURES
    if name != "LlamaForCausalLM"
    for given in (SCHEME_OPTIONS if name == "Qwen2MoeForCausalLM" else SCHEME_OPTIONS[:1])
]


@pytest.mark.parametrize(("architecture", "scheme", "options"), COMPUTED)
def test_the_engine_computes_what_the_folder_declares(architecture, scheme, options, tmp_path, monkeypatch):
    wide = {"moe_intermediate_size": 96} if "Moe" in architecture else {}
    wide |= {"shared_expert_intermediate_size": 96} if architecture == "Qwen2MoeForCausalLM" else {}
    folder, out = write_tiny(tmp_path / "in", architecture, **wide), tmp_path / "out"
    run(folder, out, "--type", scheme, "-q", *options)
    linear = forward.linear

    def rounded(p, name, x):
        # Routers are linear layers that the folder leaves as they are.
        if name.endswith("gate"):
            return linear(p, name, x)
        if options:
            return linear(p, name, with_a_zero(x))
        return linear(p, name, ROUND[scheme](x, np.abs(x).max(-1, keepdims=True)))

    monkeypatch.setattr(forward, "linear", rounded)
    tokens = np.random.default_rng(7).integers(3, 350, 40).astype(np.int32)
    (found,) = FlaxEngine(out).logits([tokens], [0])
    tensors = decoded(out, FORMATS[scheme])
    wanted = forward.logits(config_of(folder), tensors, tokens.tolist())[:-1]
    monkeypatch.undo()
    exact = forward.logits(config_of(folder), open_tiny(folder).tensors, tokens.tolist())[:-1]
    # A number halfway between two others may be rounded otherwise in float32; and always halfway is the
    # smallest number of a token that has the largest magnitude, divided by a scale of max/127.5.
    share = 0.9 if scheme == "W8A8" else 0.1
    assert divergence(wanted, found) < share * divergence(exact, found)


def test_shards_hold_together_all_tensors_of_the_single_file(model, tmp_path):
    run(model, tmp_path / "one", "--type", "W8A8", "-q")
    run(model, tmp_path / "many", "--type", "W8A8", "-q", "--max-shard-size", "100kB")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read(tmp_path / "one").values())
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor.view(np.uint8), many[name].view(np.uint8))
        assert name in load_file(tmp_path / "many" / index["weight_map"][name])


def test_importance_moves_the_error_to_columns_that_matter_less(model, tmp_path):
    imatrix = imatrix_file(tmp_path / "imatrix.gguf", model)
    run(model, tmp_path / "plain", "--type", "W4A16", "-q")
    run(model, tmp_path / "weighted", "--type", "W4A16", "--imatrix", imatrix, "-q")
    import gguf

    name = "model.layers.0.mlp.down_proj.weight"
    sums = {t.name: t.data for t in gguf.GGUFReader(str(imatrix)).tensors}
    w = sums["blk.0.ffn_down.weight.in_sum2"]
    x = read(model)[name].astype(np.float64)
    errors = [np.sum(w * (decoded(tmp_path / kind, "INT4")[name] - x) ** 2) for kind in ("plain", "weighted")]
    assert errors[1] < 0.97 * errors[0]
    assert (tmp_path / "plain/model.safetensors").read_bytes() != (
        tmp_path / "weighted/model.safetensors"
    ).read_bytes()


def test_the_quantized_tensors_are_those_of_the_library(model, tmp_path):
    run(model, tmp_path / "out", "--type", "W8A8", "-q")
    from dataclasses import replace

    name = "model.layers.1.self_attn.q_proj.weight"
    q = quantize(jnp.asarray(read(model)[name]), replace(SCALED_FORMATS["INT8"], scale_type="BF16"))
    stored = read(tmp_path / "out")
    np.testing.assert_array_equal(stored[name], q.parts["weight"])
    parts = {"weight": jnp.asarray(stored[name]), "weight_scale": jnp.asarray(stored[f"{name}_scale"])}
    np.testing.assert_array_equal(dequantize(QuantizedTensor(parts, q.format)), dequantize(q))


def test_kept_weights_stay_and_are_declared(model, tmp_path):
    run(model, tmp_path / "out", "--type", "W8A8", "-q", "--keep", r"layers\.0\..*down_proj")
    before, after = read(model), read(tmp_path / "out")
    module = "model.layers.0.mlp.down_proj"
    np.testing.assert_array_equal(
        after[f"{module}.weight"].view(np.uint16), before[f"{module}.weight"].view(np.uint16)
    )
    assert f"{module}.weight_scale" not in after
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == ["lm_head", module]


def test_rows_that_are_no_whole_groups_of_128_get_smaller_ones(tmp_path):
    folder = write_tiny(tmp_path / "in", "LlamaForCausalLM")  # rows of 64 and 96
    report = run(folder, tmp_path / "out", "--type", "W4A16")
    assert "groups of 32" in report
    (group,) = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert group["weights"]["group_size"] == 32


def test_a_folder_appears_whole_or_not_at_all(model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = read(broken)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = np.nan
    save_file(tensors, broken / "model.safetensors")
    output = run(broken, tmp_path / "out", "--type", "W8A8", "-q", code=3)
    assert f"{name}: the weight at [3, 5] is nan" in output
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_only_force_replaces_a_model_and_nothing_replaces_anything_else(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is no loss
    run(model, out, "--type", "W8A8", "-q")
    assert "--force" in run(model, out, "--type", "FP8", "-q", code=4)
    run(model, out, "--type", "FP8", "-q", "--force")
    assert config_of(out)["quantization_config"]["format"] == "float-quantized"
    (out / "photos").mkdir()
    assert "not just a model" in run(model, out, "--type", "FP8", "-q", "--force", code=4)
    shutil.copytree(model, tmp_path / "model")
    copy = tmp_path / "model"
    assert "is the model itself" in run(copy, copy, "--type", "FP8", "-q", "--force", code=4)
    assert read(copy).keys() == read(model).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_what_a_killed_run_left_is_cleared_and_what_is_not_ours_is_not(model, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "diary.txt").write_text("dear")
    assert "none of ours" in run(model, tmp_path / "out", "--type", "W8A8", "-q", code=4)
    assert (partial / "diary.txt").read_text() == "dear"
    (partial / "diary.txt").rename(partial / ".jquant")
    (partial / "model.safetensors").write_text("half of it")
    run(model, tmp_path / "out", "--type", "W8A8", "-q")
    assert not partial.exists()


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("scheme", rows(("W8A8", "W4A16", "GPTQ"), {"W8A8"}))
def test_a_killed_run_goes_on_to_the_same_folder(model, tmp_path, monkeypatch, scheme):
    checkpoint = open_checkpoint(model)
    plan = plan_folder(checkpoint, replace(SCHEMES[scheme], static=scheme == "W8A8"))
    chosen = set(plan.quantized)
    scales = {n: np.float32(0.25) for n, w in checkpoint.weights.items() if chosen.issuperset(w.parts)}
    made = Ingredients(input_scales=scales if scheme == "W8A8" else {})
    whole, out = tmp_path / "whole", tmp_path / "out"
    write_folder(checkpoint, plan, whole, made, max_shard_bytes=200_000)
    done: list[str] = []

    def kill(name: str, _: int) -> None:
        done.append(name)
        if len(done) == 9:
            raise Killed

    with pytest.raises(Killed):
        write_folder(checkpoint, plan, out, made, max_shard_bytes=200_000, progress=kill)
    assert not out.exists()
    other = Ingredients(
        {"blk.0.ffn_down": Factors(None, np.full(96, 2.0, np.float32))}, {}, made.input_scales
    )
    with pytest.raises(OutputError, match="was begun from another model or with other settings"):
        write_folder(checkpoint, plan, out, other, max_shard_bytes=200_000, resume=True)
    fewer = plan_folder(checkpoint, SCHEMES[scheme], ["layers.0"])  # other tensors in the folder
    with pytest.raises(OutputError, match="was begun from another model or with other settings"):
        write_folder(checkpoint, fewer, out, Ingredients(), max_shard_bytes=200_000, resume=True)
    again: list[str] = []

    def count(name: str, _: int) -> None:
        again.append(name)

    write_folder(checkpoint, plan, out, made, max_shard_bytes=200_000, resume=True, progress=count)
    assert not set(done[:-1]) & set(again)  # the last one's scales were still to come
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


REFUSED = {
    "gguf": (["{gguf}", "{out}", "--type", "W8A8"], 3, "give the model's Hugging Face folder"),
    "twice": (["{done}", "{out}", "--type", "W8A8"], 3, "is quantized already"),
    "keep nothing": (["{model}", "{out}", "--type", "W8A8", "--keep", "wo"], 3, "matches none of the 14"),
    "bad keep": (["{model}", "{out}", "--type", "W8A8", "--keep", "("], 3, "not a regular expression"),
    "keep of a GGUF": (["{model}", "{out}", "--type", "Q8_0", "--keep", "q_proj"], 2, "--rule"),
    "rule": (["{model}", "{out}", "--type", "W8A8", "--rule", "a=F16"], 2, "--keep"),
    "zeros of floats": (["{model}", "{out}", "--type", "FP8", "--asymmetric-activations"], 2, "W8A8"),
    "zeros of GGUF": (["{model}", "{out}", "--type", "Q8_0", "--asymmetric-activations"], 2, "W8A8"),
    "static zeros": (
        ["{model}", "{out}", "--type", "W8A8", "--asymmetric-activations", "--static-activations"],
        2,
        "--static-activations",
    ),
    "target": (["{model}", "{out}", "--type", "FP8", "--target-bpw", "4"], 2, "says nothing of"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_said(model, tmp_path, arguments, code, said):
    done, gguf = tmp_path / "done", tmp_path / "model.gguf"
    if "{done}" in arguments:
        run(model, done, "--type", "FP8", "-q")
    if "{gguf}" in arguments:
        run(model, gguf, "--type", "F16", "-q")
    places = {"model": model, "out": tmp_path / "out", "done": done, "gguf": gguf}
    output = run(*[argument.format(**places) for argument in arguments], code=code)
    assert said in " ".join(output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_stack_of_experts_is_kept_whole_or_not_at_all(tmp_path):
    folder = write_tiny(tmp_path / "in", "MixtralForCausalLM")
    output = run(
        folder, tmp_path / "out", "--type", "W8A8", "-q", "--no-smooth", "--keep", "0.*experts.1.w1", code=3
    )
    assert "not all 4 experts" in output
    run(folder, tmp_path / "out", "--type", "W8A8", "-q", "--no-smooth", "--keep", r"layers\.0.*experts")
    tokens = np.arange(3, 20, dtype=np.int32)
    (found,) = FlaxEngine(tmp_path / "out").logits([tokens], [0])
    assert np.isfinite(found).all()


def test_a_damaged_folder_is_named(model, tmp_path):
    out = tmp_path / "out"
    run(model, out, "--type", "W8A8", "-q")
    config = config_of(out)
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="none that is known here"):
        FlaxEngine(out)


def test_a_dry_run_writes_nothing_and_shows_every_tensor(model, tmp_path):
    report = json.loads(run(model, "--type", "W4A16", "--dry-run", "--json", "-q"))
    assert len(report["tensors"]) == 14
    assert "weight_packed" in run(model, "--type", "W4A16", "--dry-run", "-q")
    assert not list(tmp_path.iterdir())
