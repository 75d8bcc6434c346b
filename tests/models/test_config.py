"""Configs and checkpoints that conversion must accept, and those that it must refuse by name."""

from __future__ import annotations

import pytest
from helpers import tiny_models
from helpers.published_configs import PUBLISHED
from helpers.tiny_models import DROP, LLAMA3, YARN, SpecsOnly, tiny_config

from jquant import models
from jquant.core import Source, UserError


def as_gguf(config: dict, shapes: dict[str, tuple[int, ...]]) -> Source:
    return models.for_config(config).as_gguf(SpecsOnly(shapes), config)


# Parameters in millions: published by the models' makers, or sums of their checkpoints' sizes.
PARAMETERS = {
    "Llama-2-7b-hf": 6738, "Llama-3.2-1B-Instruct": 1236, "SmolLM2-360M-Instruct": 362,
    "Mistral-7B-v0.1": 7242, "Mistral-Nemo-Base-2407": 12248, "Mixtral-8x7B-Instruct-v0.1": 46703,
    "Qwen2.5-0.5B": 494, "Qwen1.5-MoE-A2.7B": 14316, "Qwen3-0.6B": 596, "Qwen3-30B-A3B": 30532,
    "Phi-4-mini-instruct": 3836,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted_and_have_the_published_size(name):
    config = PUBLISHED[name]
    source = as_gguf(config, tiny_models.shapes(config))
    total = sum(spec.size for name, spec in source.specs.items() if name != "rope_freqs.weight")
    assert round(total / 1e6) == PARAMETERS[name]


def test_gemma_3_4b_is_accepted_though_its_config_leaves_the_defaults_out():
    """As published: what the class of transformers has as defaults is not there."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "eos_token_id": [1, 106],
    }
    # What shapes() cannot know.
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
    shapes = tiny_models.shapes({**text, **sizes, "tie_word_embeddings": True})
    found = models.language_part(whole, SpecsOnly({f"language_model.{k}": v for k, v in shapes.items()}))
    assert found is not None
    config, source = found
    made = models.for_config(config).as_gguf(source, config)
    assert sum(spec.size for spec in made.specs.values()) == 3_880_263_168  # published: 3.88 billion


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
    "no number": (
        {"hidden_size": "64"},
        "'hidden_size' must be a positive whole number below 2147483648; got '64'",
    ),
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
