"""Tiny random models as Hugging Face folders, one for each architecture, and what tests do with them.

write_tiny(folder, "Qwen3ForCausalLM", hidden_size=256)   config.json, model.safetensors, tokenizer.json
open_tiny(folder)                                         the checkpoint as a Source
write_gguf(path, metadata, source)                        a GGUF file, written by the gguf package
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jquant.core import MetadataValue, Source, TensorSpec

DROP = object()  # as an override: leave the key out of config.json
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

BASE: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.51.0",
}
QWEN = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}
CONFIGS: dict[str, dict[str, object]] = {
    "LlamaForCausalLM": {"model_type": "llama", "attention_bias": False, "mlp_bias": False},
    "Gemma2ForCausalLM": {
        "model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "cache_implementation": "hybrid",
        "tie_word_embeddings": True,
    },
    "Gemma3ForCausalLM": {
        "model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
        "num_hidden_layers": 6, "sliding_window_pattern": 6, "rope_theta": 100.0, "rope_local_base_freq": 1e4,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_act": DROP,
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "MistralForCausalLM": {"model_type": "mistral", "head_dim": 24, "sliding_window": 64},
    "MixtralForCausalLM": {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
        "router_aux_loss_coef": 0.02, "output_router_logits": False,
    },
    "Phi3ForCausalLM": {
        "model_type": "phi3", "attention_bias": False, "original_max_position_embeddings": 32,
        "sliding_window": None, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
    "Qwen2ForCausalLM": {"model_type": "qwen2", **QWEN},
    "Qwen2MoeForCausalLM": {
        "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80, "norm_topk_prob": False, "decoder_sparse_step": 1, **QWEN,
    },
    "Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 32, "attention_bias": False, **QWEN},
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe", "head_dim": 32, "attention_bias": False, "num_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], **QWEN,
    },
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 1.5 * i for i in range(8)],
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
TOKENIZERS = {
    "Gemma2ForCausalLM": "spm",
    "Gemma3ForCausalLM": "spm",
    "LlamaForCausalLM": "llama-bpe",
    "MistralForCausalLM": "spm",
    "MixtralForCausalLM": "spm",
    "Phi3ForCausalLM": "spm",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen2",
    "Qwen3MoeForCausalLM": "qwen2",
}


def write_tiny(
    folder: Path,
    architecture: str,
    seed: int = 0,
    *,
    tokenizer: str | None = None,
    shards: int = 1,
    **overrides,
) -> Path:
    """Write a random model; overrides are entries of config.json (DROP: none). Returns the folder.

    torch_dtype decides the stored type; shards > 1 writes that many files and their index. vocab_size follows
    from the tokenizer unless it is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder, tokenizer or TOKENIZERS[architecture])
    config = {
        "architectures": [architecture],
        **BASE,
        **CONFIGS[architecture],
        "vocab_size": vocab,
        **overrides,
    }
    config = {key: value for key, value in config.items() if value is not DROP}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    dtype = DTYPES[str(config.get("torch_dtype", config.get("dtype", "float32")))]
    rng = np.random.default_rng(seed)
    tensors = {name: _random(rng, name, shape).astype(dtype) for name, shape in shapes(config).items()}
    _save(folder, tensors, shards)
    return folder


def shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """The tensors that transformers saves for this config."""
    n: dict[str, int] = {k: v for k, v in config.items() if isinstance(v, int)}
    hidden, heads, ffn = n["hidden_size"], n["num_attention_heads"], n["intermediate_size"]
    head = n.get("head_dim", hidden // heads)
    kv_heads = n.get("num_key_value_heads", heads)
    kind = config["model_type"]
    bias = bool(n.get("attention_bias"))
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (n["vocab_size"], hidden)}
    if not n.get("tie_word_embeddings"):
        out["lm_head.weight"] = (n["vocab_size"], hidden)
    out["model.norm.weight"] = (hidden,)
    for i in range(n["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        rows = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
        if kind == "phi3":
            out[f"{layer}.self_attn.qkv_proj.weight"] = (sum(rows.values()), hidden)
            out[f"{layer}.mlp.gate_up_proj.weight"] = (2 * ffn, hidden)
            out[f"{layer}.mlp.down_proj.weight"] = (hidden, ffn)
        for name, size in rows.items() if kind != "phi3" else ():
            out[f"{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
            if bias or kind in ("qwen2", "qwen2_moe"):
                out[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        out[f"{layer}.self_attn.o_proj.weight"] = (hidden, rows["q"])
        if bias:
            out[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        if str(kind).startswith(("qwen3", "gemma3")):
            out[f"{layer}.self_attn.q_norm.weight"] = out[f"{layer}.self_attn.k_norm.weight"] = (head,)
        out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if str(kind).startswith("gemma"):
            out[f"{layer}.pre_feedforward_layernorm.weight"] = (hidden,)
            out[f"{layer}.post_feedforward_layernorm.weight"] = (hidden,)
        if kind == "mixtral":
            moe = f"{layer}.block_sparse_moe"
            out[f"{moe}.gate.weight"] = (n["num_local_experts"], hidden)
            for e in range(n["num_local_experts"]):
                out |= _gated(f"{moe}.experts.{e}", ("w1", "w3", "w2"), hidden, ffn)
        elif kind in ("qwen2_moe", "qwen3_moe"):
            out[f"{layer}.mlp.gate.weight"] = (n["num_experts"], hidden)
            for e in range(n["num_experts"]):
                out |= _gated(f"{layer}.mlp.experts.{e}", PROJECTIONS, hidden, n["moe_intermediate_size"])
            if kind == "qwen2_moe":
                width = n["shared_expert_intermediate_size"]
                out |= _gated(f"{layer}.mlp.shared_expert", PROJECTIONS, hidden, width)
                out[f"{layer}.mlp.shared_expert_gate.weight"] = (1, hidden)
        elif kind != "phi3":
            out |= _gated(f"{layer}.mlp", PROJECTIONS, hidden, ffn)
            if n.get("mlp_bias"):
                sizes = zip(PROJECTIONS, (ffn, ffn, hidden), strict=True)
                out |= {f"{layer}.mlp.{name}.bias": (size,) for name, size in sizes}
    return out


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _gated(prefix: str, names: tuple[str, str, str], hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    gate, up, down = names
    return {
        f"{prefix}.{gate}.weight": (ffn, hidden),
        f"{prefix}.{up}.weight": (ffn, hidden),
        f"{prefix}.{down}.weight": (hidden, ffn),
    }


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Large enough that attention is far from uniform and every tensor shows in the logits."""
    x = rng.standard_normal(shape)
    if "norm" in name:
        return 1 + 0.2 * x
    if name.endswith("bias"):
        return 0.5 * x
    return x if "embed" in name else x * 1.5 / np.sqrt(shape[-1])


def _save(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# Tokenizers, trained on a few lines: with the split rules of real models, so that their names are recognised.

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)
SPLITS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "llama-bpe": [pre_tokenizers.Split(Regex(_WORDS + r"\p{N}{1,3}" + _REST), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(_WORDS + r"\p{N}" + _REST), "isolated")],
    "tekken": [
        pre_tokenizers.Split(
            Regex(_CASED + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"
        )
    ],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex(GPT2), "isolated"),
    ],
    "gpt-2": [pre_tokenizers.Split(Regex(GPT2), "isolated")],
}
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LINES = [
    "The quick brown fox jumps over the lazy dog. It's what they've said; we'll see, won't we?",
    "def area(r):\n    return 3.14159 * r ** 2  # πr²\n\n\tfor i in range(100): print(i, 2024)",
    "我想在苹果工作，因为天气很好。今日は良い天気です。Привет, мир! Ελληνικά κείμενα. naïve café",
    "There was once a little girl who lived in a small house near the forest with her mother.",
]


def write_tokenizer(folder: Path, kind: str, vocab_size: int = 400) -> int:
    """tokenizer.json and tokenizer_config.json; returns how many tokens. kind: a key of SPLITS, or "spm"."""
    tokenizer = spm_tokenizer(vocab_size) if kind == "spm" else bpe_tokenizer(kind, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer.get_vocab_size()


def bpe_tokenizer(kind: str, vocab_size: int = 400) -> Tokenizer:
    """Byte-level BPE; llama-bpe puts <s> before every text, as Llama 3 does with its own."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*SPLITS[kind], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(LINES, trainer)
    if kind == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


def spm_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """BPE over characters with byte fallback, as Llama 2 and Mistral have it in tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Words are kept apart while training only: merges across spaces would be learnt by heart.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL + byte_tokens, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][: len(SPECIAL)]
    saved["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


class ArraySource:
    """A Source over arrays in memory."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = tensors
        types = {np.dtype(DTYPES[name]): TYPES[name] for name in DTYPES}
        self.specs = {
            name: TensorSpec(name, tensor.shape, types[tensor.dtype]) for name, tensor in tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        spec = self.specs[name]
        return self.tensors[name].reshape(spec.rows, spec.cols)[start:stop].view(np.uint8)


def tiny_config(architecture: str, **overrides: object) -> dict[str, object]:
    """A config.json without its files; overrides as for write_tiny."""
    config = {"architectures": [architecture], **BASE, **CONFIGS[architecture]}
    config |= {"vocab_size": 400, **overrides}
    return {key: value for key, value in config.items() if value is not DROP}


class SpecsOnly:
    """A checkpoint of headers without data, as a Source."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.specs = {name: TensorSpec(name, shape, "F32") for name, shape in shapes.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.ones((self.specs[name].rows, self.specs[name].row_bytes), np.uint8)[start:stop]


def open_tiny(folder: Path) -> ArraySource:
    """All safetensors of a folder, as a Source."""
    files = sorted(folder.glob("*.safetensors"))
    return ArraySource({name: tensor for file in files for name, tensor in load_file(file).items()})


def write_gguf(path: Path, metadata: Mapping[str, MetadataValue], source: Source) -> Path:
    """Write every tensor as it is stored, by the gguf package; returns the path.

    Vectors become float32, as llama.cpp's converter stores them.
    """
    writer = gguf.GGUFWriter(str(path), str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, spec in source.specs.items():
        data = source.read(name)
        type = gguf.GGMLQuantizationType[spec.type]
        if len(spec.shape) == 1 or "ffn_gate_inp" in name:
            values = gguf.quants.dequantize(data, type).astype(np.float32).reshape(spec.shape)
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, data.reshape(*spec.shape[:-1], -1), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: MetadataValue) -> None:
    kinds = {
        np.dtype(np.uint32): gguf.GGUFValueType.UINT32,
        np.dtype(np.int32): gguf.GGUFValueType.INT32,
        np.dtype(np.float32): gguf.GGUFValueType.FLOAT32,
    }
    if isinstance(value, np.ndarray):
        writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, kinds[value.dtype])
    elif isinstance(value, np.generic):
        writer.add_key_value(key, value.item(), kinds[value.dtype])
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
