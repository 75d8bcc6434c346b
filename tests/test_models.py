"""Checkpoints as GGUF: llama.cpp computes from them what a NumPy forward pass computes from the original."""

from __future__ import annotations

import json
from pathlib import Path

import forward
import gguf
import llama_cpp
import numpy as np
import pytest
import tiny_models
from published_configs import PUBLISHED
from tiny_models import DROP, open_tiny, write_gguf, write_tiny

from jquant import models
from jquant.core import Source, TensorSpec, UserError
from jquant.io import tokenizer
from jquant.models import ARCHITECTURES

SHARED = Path(__file__).resolve().parents[2] / "shared"
PROMPT = [int(i) for i in np.random.default_rng(7).integers(3, 350, 24)]


def convert(folder: Path, path: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    architecture = models.for_config(config)
    header = architecture.metadata(config, folder.name) | tokenizer.metadata(folder, config)
    return write_gguf(path, header, architecture.as_gguf(open_tiny(folder), config))


def llama_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """[tokens, vocab], with a float32 cache so that only sums differ from the reference."""
    model = llama_cpp.Llama(
        str(path), verbose=False, logits_all=True, n_ctx=128, n_threads=1, type_k=0, type_v=0
    )
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def assert_same_logits(folder: Path, path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    wanted = forward.logits(config, open_tiny(folder).tensors, PROMPT)
    np.testing.assert_allclose(llama_logits(convert(folder, path), PROMPT), wanted, atol=2e-4)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "no kv heads": ("LlamaForCausalLM", {"num_key_value_heads": DROP}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("LlamaForCausalLM", {"head_dim": 24}),
    "head_dim null": ("LlamaForCausalLM", {"head_dim": None}),
    "linear": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama3": ("LlamaForCausalLM", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "yarn": ("LlamaForCausalLM", {"rope_scaling": YARN, "rope_theta": 100.0}),
    "yarn attention factor": ("Qwen2ForCausalLM", {"rope_scaling": {**YARN, "attention_factor": 0.7}}),
    "transformers 5": (
        "Qwen3ForCausalLM",
        {"rope_parameters": {**YARN, "rope_theta": 50.0}, "rope_theta": DROP, "dtype": "float32",
         "torch_dtype": DROP, "layer_types": ["full_attention"] * 2},
    ),
    "no head_dim": ("MixtralForCausalLM", {"head_dim": DROP}),
    "tied experts": ("Qwen3MoeForCausalLM", {"tie_word_embeddings": True}),
    "one expert each": ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 1}),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_computes_the_same_logits(architecture, tmp_path):
    assert_same_logits(write_tiny(tmp_path / "hf", architecture), tmp_path / "out.gguf")


@pytest.mark.parametrize(("architecture", "overrides"), CASES.values(), ids=CASES)
def test_llama_cpp_computes_the_same_logits_of_every_variant(architecture, overrides, tmp_path):
    assert_same_logits(write_tiny(tmp_path / "hf", architecture, **overrides), tmp_path / "out.gguf")


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
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
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
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


def tiny_config(architecture: str, **overrides) -> dict:
    config = {"architectures": [architecture], **tiny_models.BASE, **tiny_models.CONFIGS[architecture]}
    config |= {"vocab_size": 400, **overrides}
    return {key: value for key, value in config.items() if value is not DROP}


class SpecsOnly:
    """A checkpoint of headers without data."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.specs = {name: TensorSpec(name, shape, "F32") for name, shape in shapes.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise NotImplementedError


# Parameters in millions: published by the models' makers, or sums of their checkpoints' sizes.
PARAMETERS = {
    "Llama-2-7b-hf": 6738, "Llama-3.2-1B-Instruct": 1236, "SmolLM2-360M-Instruct": 362,
    "Mistral-7B-v0.1": 7242, "Mistral-Nemo-Base-2407": 12248, "Mixtral-8x7B-Instruct-v0.1": 46703,
    "Qwen2.5-0.5B": 494, "Qwen1.5-MoE-A2.7B": 14316, "Qwen3-0.6B": 596, "Qwen3-30B-A3B": 30532,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted_and_have_the_published_size(name):
    config = PUBLISHED[name]
    source = as_gguf(config, tiny_models.shapes(config))
    total = sum(spec.size for name, spec in source.specs.items() if name != "rope_freqs.weight")
    assert round(total / 1e6) == PARAMETERS[name]


REFUSED = {
    "unknown key": ({"logit_scale": 0.0625}, r"not handled for LlamaForCausalLM: 'logit_scale' = 0\.0625"),
    "activation": ({"hidden_act": "gelu"}, "'hidden_act' = 'gelu' is not supported"),
    "quantized": ({"quantization_config": {"bits": 4}}, "already quantized"),
    "rope type": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    "rope key": ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "not handled: 'x' = 1"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "needs 'factor'"),
    "yarn beta": ({"rope_scaling": {**YARN, "beta_fast": 16}}, "'beta_fast' = 16"),
    "partial": ({"partial_rotary_factor": 0.5}, r"'partial_rotary_factor' = 0\.5"),
    "missing": ({"vocab_size": DROP}, "needs 'vocab_size', which is missing"),
    "no number": ({"hidden_size": "64"}, "'hidden_size' must be a positive whole number; got '64'"),
    "negative": ({"rms_norm_eps": -1.0}, r"'rms_norm_eps' must be a positive number; got -1\.0"),
    "kv heads": ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 3}, "no multiple of num_attention_heads 3"),
    "odd head": ({"head_dim": 15}, "'head_dim' must be even"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types'"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_a_config_that_would_be_misread_is_refused_by_key(overrides, message):
    config = tiny_config("LlamaForCausalLM", **overrides)
    with pytest.raises(UserError, match=message) as error:
        models.for_config(config).metadata(config)
    assert "\n" not in str(error.value)


QWEN_REFUSED = {
    "llama3 rope": ("Qwen2ForCausalLM", {"rope_scaling": LLAMA3}, "rope scaling 'llama3' is not supported"),
    "window": ("Qwen3ForCausalLM", {"use_sliding_window": True}, "'use_sliding_window' = True"),
    "bias": ("Qwen3ForCausalLM", {"attention_bias": True}, "'attention_bias' = True"),
    "top-k": ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "'norm_topk_prob' = False"),
    "dense layers": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, r"'mlp_only_layers' = \[0\]"),
    "tied": ("Qwen2MoeForCausalLM", {"tie_word_embeddings": True}, "'tie_word_embeddings' = True"),
    "narrow heads": ("Qwen2ForCausalLM", {"head_dim": 8}, "differs from hidden_size"),
}


@pytest.mark.parametrize(("architecture", "overrides", "message"), QWEN_REFUSED.values(), ids=QWEN_REFUSED)
def test_what_llama_cpps_graph_lacks_is_refused_by_key(architecture, overrides, message):
    config = tiny_config(architecture, **overrides)
    with pytest.raises(UserError, match=message):
        models.for_config(config).as_gguf(SpecsOnly(tiny_models.shapes(config)), config)


@pytest.mark.parametrize("named", [None, [], ["GemmaForCausalLM"]], ids=str)
def test_an_unknown_architecture_is_refused_with_the_known_ones(named):
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*Qwen3MoeForCausalLM"):
        models.for_config({"architectures": named})


def as_gguf(config: dict, shapes: dict[str, tuple[int, ...]]) -> Source:
    return models.for_config(config).as_gguf(SpecsOnly(shapes), config)


def test_a_missing_tensor_is_named():
    config = tiny_config("LlamaForCausalLM")
    shapes = tiny_models.shapes(config)
    del shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is expected"):
        as_gguf(config, shapes)


def test_a_missing_output_matrix_points_at_tied_embeddings():
    config = tiny_config("LlamaForCausalLM")
    shapes = tiny_models.shapes(config)
    del shapes["lm_head.weight"]
    with pytest.raises(UserError, match=r"lm_head\.weight is expected .*tie_word_embeddings is false"):
        as_gguf(config, shapes)


def test_an_unexpected_tensor_is_named():
    config = tiny_config("LlamaForCausalLM")
    shapes = tiny_models.shapes(config) | {"model.layers.0.self_attn.q_proj.bias": (64,)}
    with pytest.raises(UserError, match=r"q_proj\.bias is in the checkpoint but unknown to LlamaForCausalLM"):
        as_gguf(config, shapes)


def test_a_wrong_shape_is_traced_to_the_config():
    config = tiny_config("LlamaForCausalLM")
    shapes = tiny_models.shapes(config) | {"model.layers.0.self_attn.k_proj.weight": (64, 64)}
    message = (
        r"k_proj\.weight: config\.json implies shape \(32, 64\) \(num_key_value_heads \* head_dim = 32, "
        r"hidden_size = 64\); the checkpoint has \(64, 64\)"
    )
    with pytest.raises(UserError, match=message):
        as_gguf(config, shapes)


def test_buffers_and_a_tied_output_matrix_are_left_out():
    config = tiny_config("LlamaForCausalLM", tie_word_embeddings=True)
    shapes = tiny_models.shapes(config)
    wanted = set(as_gguf(config, shapes).specs)
    spare = {"lm_head.weight": (400, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    assert set(as_gguf(config, shapes | spare).specs) == wanted
    assert "output.weight" not in wanted


REAL = [SHARED / "data/models/stories15M", SHARED / "data/models/stories260K"]


@pytest.mark.parametrize("folder", REAL, ids=lambda folder: folder.name)
def test_a_story_model_tells_a_story_and_computes_the_same_logits(folder, tmp_path):
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/data/models/{folder.name}")
    path = convert(folder, tmp_path / "out.gguf")
    model = llama_cpp.Llama(str(path), verbose=False, n_ctx=64, n_threads=2)
    story = model("Once upon a time, there was a little", max_tokens=12, temperature=0)["choices"][0]["text"]
    assert story.startswith(" girl named Lily. She")
    config = json.loads((folder / "config.json").read_text())
    tokens = [1, *PROMPT]
    wanted = forward.logits(config, open_tiny(folder).tensors, tokens)
    np.testing.assert_allclose(llama_logits(path, tokens), wanted, atol=5e-3)
