"""Models of published sizes without their weights: headers to compile for, folders of random ones to run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from jquant import models
from jquant.core import TensorSpec

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_LLAMA3 = {
    **_LLAMA, "rope_theta": 500000.0, "vocab_size": 128256, "max_position_embeddings": 8192,
    "num_key_value_heads": 8, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
# As published with Llama-2-7b, Meta-Llama-3-8B, -70B and -3.1-405B, and Qwen3-235B-A22B.
MODELS = {
    "Llama-2-7B": {
        **_LLAMA, "rope_theta": 10000.0, "vocab_size": 32000, "max_position_embeddings": 4096,
        "num_key_value_heads": 32, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
        "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32,
    },
    "Llama-3-8B": {
        **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "Llama-3-70B": {
        **_LLAMA3, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "Llama-3.1-405B": {
        **_LLAMA3, "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128,
        "num_hidden_layers": 126,
    },
    "Qwen3-235B-A22B": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 12288, "max_position_embeddings": 40960, "mlp_only_layers": [],
        "moe_intermediate_size": 1536, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 94, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
    },
}  # fmt: skip


def block_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Of a block of a Llama, or of a Qwen3 with experts, by GGUF's names without the block's."""
    width, hidden, heads = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = config.get("head_dim", width // heads)
    queries, keys = head * heads, head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,), "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width),
        "attn_output": (width, queries), "ffn_norm": (width,),
    }  # fmt: skip
    if "num_experts" not in config:
        return {**shapes, "ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
    experts, inner = config["num_experts"], config["moe_intermediate_size"]
    return {
        **shapes, "attn_q_norm": (head,), "attn_k_norm": (head,), "ffn_gate_inp": (experts, width),
        "ffn_gate_exps": (experts, inner, width), "ffn_up_exps": (experts, inner, width),
        "ffn_down_exps": (experts, width, inner),
    }  # fmt: skip


class Headers:
    """A model without weights."""

    def __init__(self, config: Mapping) -> None:
        width = config["hidden_size"]
        shapes = {"token_embd.weight": (config["vocab_size"], width), "output_norm.weight": (width,)}
        for i in range(config["num_hidden_layers"]):
            shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block_shapes(config).items()}
        self.specs = {name: TensorSpec(name, shape, "BF16") for name, shape in shapes.items()}
        self.metadata = models.for_config(dict(config)).metadata(dict(config), "headers only")

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise NotImplementedError(name)

    def tensor(self, name: str) -> np.ndarray:
        raise NotImplementedError(name)


_HF = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def write_folder(folder: Path, config: Mapping, tokenizer: Path) -> int:
    """A Hugging Face folder whose blocks all have the same random weights, bfloat16, in one file a block; the
    tokenizer is another folder's, of at most so many tokens. Returns the number of weights."""
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, folder)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    rng, width = np.random.default_rng(0), config["hidden_size"]

    def matrix(shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        return (values if len(shape) > 1 else np.ones(shape)).astype(ml_dtypes.bfloat16)

    block = {_HF[name]: matrix(shape) for name, shape in block_shapes(config).items()}
    parts: list[dict[str, np.ndarray]] = [
        {f"model.layers.{i}.{name}.weight": value for name, value in block.items()}
        for i in range(config["num_hidden_layers"])
    ]
    ends = {"model.embed_tokens.weight": matrix((config["vocab_size"], width))}
    ends["lm_head.weight"] = ends["model.embed_tokens.weight"][::-1]
    parts.append({**ends, "model.norm.weight": matrix((width,))})
    where, count = {}, 0
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        where |= dict.fromkeys(part, file)
        count += sum(value.size for value in part.values())
        _write(folder / file, part)
    index = {"metadata": {"total_size": 2 * count}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def _write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, at = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": (at, at + value.nbytes)}
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value).view(np.uint8).data)
