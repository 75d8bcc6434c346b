"""What configs may say otherwise than those of CONFIGS: name → architecture and overrides for write_tiny."""

from helpers.tiny_models import DROP, LLAMA3, LONGROPE, YARN

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
    "longrope, long": ("Phi3ForCausalLM", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 16}),
    "longrope, short": (
        "Phi3ForCausalLM",
        {"rope_scaling": {**LONGROPE, "type": "su"}, "original_max_position_embeddings": 256,
         "max_position_embeddings": 512},
    ),
    "a part of each head": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.75}),
    "a part of each head, longrope": (
        "Phi3ForCausalLM",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 16,
         "rope_scaling": {key: value if key == "type" else value[:6] for key, value in LONGROPE.items()}},
    ),
    "a part of each head, transformers 5": (
        "Phi3ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
         "rope_theta": DROP},
    ),
    "rope of each kind of block": (
        "Gemma3ForCausalLM",
        {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
         "rope_scaling": DROP, "rope_theta": DROP, "rope_local_base_freq": DROP},
    ),
    "one expert each": ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 1}),
}  # fmt: skip
