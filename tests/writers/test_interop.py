"""Folders as transformers and compressed-tensors load them. Needs pip install 'jquant-llm[interop]'.

Rounding inputs amplifies the last bit: a model that differs from itself by 1e-7 in its embedding rounds a few
numbers otherwise, and after some blocks the two differ as much as rounding makes them differ from the
original. So weights and rounding are compared to the bit each, and the whole with what Torch keeps to itself.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.divergence import divergence
from helpers.folders import config_of, read, run
from helpers.shapes import GROUPED
from helpers.tiny_models import LINES, write_tiny

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jquant-llm[interop]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
compressed_tensors = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import forward_quantize  # noqa: E402

from jquant.checkpoints.model import open_model  # noqa: E402
from jquant.evaluation.engines import FlaxEngine  # noqa: E402
from jquant.evaluation.flax_engine import FlaxEngine as Engine  # noqa: E402
from jquant.int8.rounding import QUANTIZERS, STATIC_QUANTIZERS, asymmetric_int8  # noqa: E402

# Both packages say a good deal that is no concern of ours.
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
SCHEMES = ("W8A8", "FP8", "W4A16")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM")
TOKENS = np.random.default_rng(7).integers(3, 350, (2, 60)).astype(np.int32)


def static(tmp_path: Path) -> list[object]:
    """Options for scales of inputs that are calibrated."""
    (tmp_path / "text.txt").write_text("\n".join(LINES * 12))
    text = ["-c", tmp_path / "text.txt", "--samples", "6", "--sequence-length", "48"]
    return ["--static-activations", *text]


def loaded(folder: Path, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():  # weights are decoded in the first forward pass
        model(torch.tensor(TOKENS[:1, :2], dtype=torch.long))
    return model


def logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()[:, :-1]


def round_inputs(model, wanted: bool) -> None:
    for module in model.modules():
        module.quantization_enabled = wanted


def ours(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    return np.stack(list(engine.logits(list(tokens), [0] * len(tokens))))


def weights_alone(folder: Path) -> Engine:
    engine = FlaxEngine(folder)
    engine._decoder = engine._decoder.rounded(lambda x: x, ())
    return engine


@every_scheme
@pytest.mark.parametrize("architecture", DENSE)
def test_transformers_reads_the_weights_that_we_read(architecture, scheme, tmp_path):
    overrides = {"head_dim": 32} if architecture == "MistralForCausalLM" else {}
    # The default of Phi-3's class is a token that tiny vocabularies lack.
    overrides |= {"pad_token_id": 0} if architecture == "Phi3ForCausalLM" else {}
    folder = write_tiny(tmp_path / "in", architecture, **GROUPED, **overrides)
    run(folder, tmp_path / "out", "--type", scheme, "-q")
    model = loaded(tmp_path / "out")
    round_inputs(model, False)
    found, wanted = ours(weights_alone(tmp_path / "out"), TOKENS), logits(model, TOKENS)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= 0.999
    original = loaded(folder)
    assert divergence(logits(original, TOKENS), wanted) > 100 * divergence(wanted, found)


def test_the_converter_of_compressed_tensors_reads_awq_as_we_do(tmp_path):
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    folder = write_tiny(tmp_path / "in", "LlamaForCausalLM", torch_dtype="float16", **GROUPED)
    run(folder, tmp_path / "out", "--type", "AWQ", "-q", "--keep", "0.*down_proj")
    tensors = {name: torch.tensor(t) for name, t in read(tmp_path / "out").items()}
    declared = config_of(tmp_path / "out")["quantization_config"]
    converter = AutoAWQConverter.from_autoawq_config(declared)
    converter.validate(tensors)
    made, view = converter.process(tensors), open_model(tmp_path / "out").source
    packed = [name for name in made if name.endswith("weight_packed")]
    assert len(packed) == 13
    for name in packed:
        module = name.removesuffix(".weight_packed")
        scale = made[f"{module}.weight_scale"].float()
        shape = torch.Size(made[f"{module}.weight_shape"].tolist())
        codes = unpack_from_int32(made[name], 4, shape).float()
        zeros = unpack_from_int32(made[f"{module}.weight_zero_point"], 4, scale.shape, packed_dim=0).float()
        groups = codes.reshape(*scale.shape, -1) - zeros[..., None]
        wanted = (groups * scale[..., None]).reshape(shape).numpy()
        found = view._source.read(f"{module}.weight").view(np.float32)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("scheme", "kind"), [("W8A8", "int8"), ("FP8", "fp8")])
def test_inputs_are_rounded_to_the_same_bits(scheme, kind, tmp_path):
    folder = write_tiny(tmp_path / "in", "LlamaForCausalLM", **GROUPED)
    run(folder, tmp_path / "out", "--type", scheme, "-q")
    layer = loaded(tmp_path / "out").model.layers[0].mlp.up_proj
    x = np.random.default_rng(1).standard_normal((3, 50, 128)).astype(np.float32)
    x[..., 7] -= 30
    x[1, 2] = 0
    x[2, 3] *= 1e-20
    wanted = forward_quantize(layer, torch.tensor(x), "input", layer.quantization_scheme.input_activations)
    codes, scale = QUANTIZERS[kind](jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(codes).astype(np.float32) * np.asarray(scale), wanted.numpy())


def test_inputs_with_a_zero_are_rounded_to_the_same_bits(tmp_path):
    folder = write_tiny(tmp_path / "in", "LlamaForCausalLM", **GROUPED)
    run(folder, tmp_path / "out", "--type", "W8A8", "-q", "--asymmetric-activations")
    layer = loaded(tmp_path / "out").model.layers[0].mlp.up_proj
    x = np.random.default_rng(1).standard_normal((3, 50, 128)).astype(np.float32)
    x[..., 7] -= 30
    x[1, 2] = 0
    x[2, 3] *= 1e-20
    x[2, 4] = np.abs(x[2, 4])
    wanted = forward_quantize(layer, torch.tensor(x), "input", layer.quantization_scheme.input_activations)
    codes, scale, zero = map(np.asarray, asymmetric_int8(jnp.asarray(x)))
    found = (codes.astype(np.float32) - zero.astype(np.float32)) * scale
    np.testing.assert_array_equal(found, wanted.numpy())


@pytest.mark.parametrize(("scheme", "kind"), [("W8A8", "int8"), ("FP8", "fp8")])
def test_inputs_are_rounded_by_the_stored_scale_to_the_same_bits(scheme, kind, tmp_path):
    folder = write_tiny(tmp_path / "in", "LlamaForCausalLM", **GROUPED)
    smooths = ["--alpha", "0.5"] if scheme == "W8A8" else []
    run(folder, tmp_path / "out", "--type", scheme, "-q", *smooths, *static(tmp_path))
    layer = loaded(tmp_path / "out").model.layers[0].mlp.up_proj
    stored = read(tmp_path / "out")["model.layers.0.mlp.up_proj.input_scale"]
    assert stored == layer.input_scale.numpy()
    x = np.random.default_rng(1).standard_normal((3, 50, 128)).astype(np.float32)
    x[..., 7] -= 30  # beyond the largest
    x[1, 2] = 0
    wanted = forward_quantize(layer, torch.tensor(x), "input", layer.quantization_scheme.input_activations)
    codes, scale = STATIC_QUANTIZERS[kind](jnp.asarray(x), jnp.asarray(stored[0]))
    np.testing.assert_array_equal(np.asarray(codes).astype(np.float32) * np.asarray(scale), wanted.numpy())


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("scheme", ["W8A8", "FP8"])
def test_predictions_agree_as_nearly_as_torch_agrees_with_itself(scheme, is_static, tmp_path, shared):
    stories = shared("data/models/stories260K")
    run(stories, tmp_path / "out", "--type", scheme, "-q", *(static(tmp_path) if is_static else []))
    tokens = np.random.default_rng(3).integers(3, 500, (8, 120)).astype(np.int32)
    model, original = loaded(tmp_path / "out"), loaded(stories)
    wanted = logits(model, tokens)
    found = ours(FlaxEngine(tmp_path / "out"), tokens)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    itself = divergence(wanted, logits(model, tokens))
    away = divergence(logits(original, tokens), wanted)
    assert divergence(wanted, found) < max(2 * itself, 0.1 * away)
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.97


@pytest.mark.parametrize("scheme", ["GPTQ", "AWQ"])
def test_transformers_loads_layouts_of_four_bits(scheme, tmp_path):
    """By gptqmodel, whose kernel in plain Torch is exact; others compute in 16 bits."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed: pip install gptqmodel optimum")
    folder = write_tiny(tmp_path / "model", "LlamaForCausalLM", **GROUPED)
    run(folder, tmp_path / "out", "--type", scheme, "-q")
    declared = (
        transformers.GPTQConfig(bits=4, backend="torch")
        if scheme == "GPTQ"
        else transformers.AwqConfig(bits=4, backend="torch_awq")
    )
    model = loaded(tmp_path / "out", device_map="cpu", quantization_config=declared)
    assert "gptqmodel" in type(model.model.layers[0].self_attn.q_proj).__module__
    found, wanted = ours(FlaxEngine(tmp_path / "out"), TOKENS), logits(model, TOKENS)
    assert divergence(wanted, found) < 1e-4
    original = ours(FlaxEngine(folder), TOKENS)
    assert divergence(original, found) > 100 * divergence(wanted, found)
