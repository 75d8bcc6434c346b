"""Models as headers only: the tensors and metadata of many architectures, for tests of the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jquant.core import Metadata, MetadataValue, TensorSpec


class Header(NamedTuple):
    specs: dict[str, TensorSpec]
    metadata: Metadata


def header(architecture: str, tensors: dict[str, tuple[int, ...]], **numbers: MetadataValue) -> Header:
    """Matrices are F16, the rest is F32, as llama.cpp's converter has it. "__" in a key stands for a dot."""
    defaults: dict[str, MetadataValue] = {
        "context_length": np.uint32(512),
        "embedding_length": np.uint32(256),
        "feed_forward_length": np.uint32(512),
        "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "attention.layer_norm_epsilon": np.float32(1e-5),
    }
    values = defaults | {key.replace("__", "."): value for key, value in numbers.items()}
    metadata = {f"{architecture}.{key}": value for key, value in values.items()}

    def type_of(name: str, shape: tuple[int, ...]) -> str:
        is_f32 = len(shape) == 1 or "norm" in name or "ffn_gate_inp" in name or not name.endswith("weight")
        return "F32" if is_f32 else "F16"

    specs = {name: TensorSpec(name, shape, type_of(name, shape)) for name, shape in tensors.items()}
    return Header(specs, {"general.architecture": architecture, **metadata})


def dense(
    layers: int = 12,
    heads: int = 8,
    heads_kv: int = 8,
    width: int = 512,
    ffn: int = 1024,
    *,
    architecture: str = "llama",
    tied: bool = False,
    bias: bool = False,
    only: tuple[str, ...] = ("",),
) -> Header:
    """Llama, Qwen2 (with bias) and their like; only: of the layers, these tensors."""
    kv = width // heads * heads_kv
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, width), "output_norm.weight": (width,)}
    if not tied:
        tensors["output.weight"] = (1000, width)
    for i in range(layers):
        tensors |= _attention(i, width, kv, width, bias=bias) | {
            f"blk.{i}.ffn_norm.weight": (width,),
            f"blk.{i}.ffn_gate.weight": (ffn, width),
            f"blk.{i}.ffn_up.weight": (ffn, width),
            f"blk.{i}.ffn_down.weight": (width, ffn),
        }
    tensors = {n: s for n, s in tensors.items() if not n.startswith("blk.") or any(o in n for o in only)}
    return header(architecture, tensors, **_heads(layers, heads, heads_kv, width))


def experts(
    layers: int,
    n: int,
    *,
    architecture: str = "llama",
    dense_layers: int = 0,
    shared: bool = False,
    heads: int = 8,
    heads_kv: int = 2,
) -> Header:
    """Mixtral, Qwen3-MoE and their like: experts stacked in one tensor of three axes."""
    width, ffn = 256, 512
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (1000, width),
        "output.weight": (1000, width),
        "output_norm.weight": (width,),
    }
    for i in range(layers):
        tensors |= _attention(i, width, width // heads * heads_kv, width)
        if i < dense_layers:
            tensors |= {
                f"blk.{i}.ffn_gate.weight": (ffn, width),
                f"blk.{i}.ffn_up.weight": (ffn, width),
                f"blk.{i}.ffn_down.weight": (width, ffn),
            }
            continue
        tensors |= {
            f"blk.{i}.ffn_gate_inp.weight": (n, width),
            f"blk.{i}.ffn_gate_exps.weight": (n, ffn, width),
            f"blk.{i}.ffn_up_exps.weight": (n, ffn, width),
            f"blk.{i}.ffn_down_exps.weight": (n, width, ffn),
        }
        if shared:
            tensors |= {
                f"blk.{i}.ffn_gate_shexp.weight": (ffn, width),
                f"blk.{i}.ffn_up_shexp.weight": (ffn, width),
                f"blk.{i}.ffn_down_shexp.weight": (width, ffn),
            }
    numbers = _heads(layers, heads, heads_kv, width) | {
        "expert_count": np.uint32(n),
        "expert_used_count": np.uint32(2),
        "expert_feed_forward_length": np.uint32(ffn),
    }
    return header(architecture, tensors, **numbers)


def separate_experts(layers: int = 4, n: int = 8) -> Header:
    """The first Mixtral files: each expert a tensor of its own."""
    stacked = experts(layers, n)
    tensors: dict[str, tuple[int, ...]] = {}
    for name, spec in stacked.specs.items():
        if "_exps" in name:
            tensors |= {name.replace("_exps.", f".{e}."): spec.shape[1:] for e in range(n)}
        else:
            tensors[name] = spec.shape
    return Header(header("llama", tensors).specs, stacked.metadata)


def fused(architecture: str, layers: int, *, tied: bool = False) -> Header:
    """Falcon and Phi-3: one matrix for q, k and v."""
    width, ffn = 256, 1024
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, width), "output_norm.weight": (width,)}
    if not tied:
        tensors["output.weight"] = (1000, width)
    for i in range(layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.attn_qkv.weight": (3 * width, width),
            f"blk.{i}.attn_output.weight": (width, width),
            f"blk.{i}.ffn_up.weight": (ffn, width),
            f"blk.{i}.ffn_down.weight": (width, ffn),
        }
    return header(architecture, tensors, **_heads(layers, 4, 1, width))


def mla(layers: int = 10) -> Header:
    """DeepSeek 2: latent attention, one dense layer, shared experts."""
    model = experts(layers, 16, architecture="deepseek2", dense_layers=1, shared=True)
    tensors = {n: s.shape for n, s in model.specs.items() if ".attn_k." not in n and ".attn_v." not in n}
    for i in range(layers):
        tensors |= {
            f"blk.{i}.attn_kv_a_mqa.weight": (320, 256),
            f"blk.{i}.attn_kv_a_norm.weight": (256,),
            f"blk.{i}.attn_kv_b.weight": (512, 256),
        }
    numbers = {
        "deepseek2.attention.kv_lora_rank": np.uint32(256),
        "deepseek2.expert_shared_count": np.uint32(1),
    }
    numbers |= {"deepseek2.attention.q_lora_rank": np.uint32(256)}
    return Header(header("deepseek2", tensors).specs, {**model.metadata, **numbers})


def mixed_heads() -> Header:
    """Key heads that differ by layer, as in Llama-Nemotron and OpenELM: layer 0 counts."""
    model = dense(8, heads=8, heads_kv=2)
    per_layer = np.array([2, 8, 8, 8, 8, 8, 8, 8], np.int32)
    return Header(model.specs, {**model.metadata, "llama.attention.head_count_kv": per_layer})


def mamba() -> Header:
    """No attention at all."""
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, 256), "output_norm.weight": (256,)}
    for i in range(8):
        tensors |= {
            f"blk.{i}.ssm_in.weight": (1024, 256),
            f"blk.{i}.ssm_conv1d.weight": (512, 4),
            f"blk.{i}.ssm_x.weight": (48, 512),
            f"blk.{i}.ssm_dt.weight": (512, 16),
            f"blk.{i}.ssm_dt.bias": (512,),
            f"blk.{i}.ssm_a": (512, 16),
            f"blk.{i}.ssm_out.weight": (256, 512),
        }
    numbers = {"conv_kernel": 4, "inner_size": 512, "state_size": 16, "time_step_rank": 16}
    made = header("mamba", tensors, **{f"ssm__{k}": np.uint32(v) for k, v in numbers.items()})
    made.specs.update({n: TensorSpec(n, s.shape, "F32") for n, s in made.specs.items() if "conv1d" in n})
    return Header(made.specs, {**made.metadata, "mamba.block_count": np.uint32(8)})


def oddities() -> Header:
    """Names from everywhere that are not to be quantized, beside some that only look so."""
    model = dense(4)
    names = [
        "per_layer_model_proj.weight",
        "blk.0.altup_router.weight",
        "blk.0.laurel_l.weight",
        "blk.0.indexer.k_proj.weight",
        "blk.0.indexer.q_proj.weight",
        "blk.0.attn_rel_b.weight",
        "v.patch_embd.weight",
        "mm.patch_merger.weight",
        "v.sam.neck.0.weight",
        "v.blk.0.attn_rel_pos.weight",
        "a.rvq.codebook.0.weight",
        "mm.a.code_embd.weight",
        "blk.0.time_mix_w0.weight",
        "blk.0.time_mix_a1.weight",
        "blk.0.time_mix_g2.weight",
        "per_layer_token_embd.weight",
        "blk.0.ffn_gate_inp_shexp.weight",
        "blk.0.attn_q_a.weight",
        "blk.0.attn_q_b.weight",
        "blk.1.time_mix_key.weight",
        "blk.0.ssm_in.weight",
        "blk.0.inp_gate.weight",
    ]
    extra = {name: TensorSpec(name, (256, 256), "F16") for name in names}
    in_float32 = [
        "position_embd.weight",
        "token_types.weight",
        "v.position_embd.weight",
        "blk.0.attn_q_norm.weight",
        "blk.0.time_mix_w1.weight",
        "blk.0.time_mix_lerp_fused.weight",
        "blk.0.altup_predict_coef.weight",
        "blk.0.shortconv.conv.weight",
    ]
    extra |= {name: TensorSpec(name, (256, 256), "F32") for name in in_float32}
    extra["blk.0.one_row.weight"] = TensorSpec("blk.0.one_row.weight", (1, 256), "F32")
    extra["blk.0.ffn_gate_tid2eid.weight"] = TensorSpec("blk.0.ffn_gate_tid2eid.weight", (64, 8), "I32")
    return Header(model.specs | extra, model.metadata)


def _attention(i: int, width: int, kv: int, q: int, *, bias: bool = False) -> dict[str, tuple[int, ...]]:
    rows = {"q": q, "k": kv, "v": kv}
    biases = {f"blk.{i}.attn_{p}.bias": (n,) for p, n in rows.items()} if bias else {}
    return {
        f"blk.{i}.attn_norm.weight": (width,),
        **{f"blk.{i}.attn_{p}.weight": (n, width) for p, n in rows.items()},
        **biases,
        f"blk.{i}.attn_output.weight": (width, q),
    }


def _heads(layers: int, heads: int, heads_kv: int, width: int) -> dict[str, MetadataValue]:
    return {
        "block_count": np.uint32(layers),
        "embedding_length": np.uint32(width),
        "attention__head_count": np.uint32(heads),
        "attention__head_count_kv": np.uint32(heads_kv),
    }


BY_LAYER = ("attn_v", "ffn_down")  # whose type depends on the layer; the rest only costs time

MODELS: dict[str, Callable[[], Header]] = {
    "llama": dense,
    "llama-gqa4": lambda: dense(heads_kv=2),
    "llama-gqa8-tied": lambda: dense(16, heads_kv=1, tied=True),
    "llama-one-layer": lambda: dense(1),
    "llama-rows-of-576": lambda: dense(10, heads=9, heads_kv=3, width=576, ffn=1536, tied=True),
    "llama-rows-of-576-untied": lambda: dense(10, heads=9, heads_kv=3, width=576, ffn=1536),
    "llama-rows-of-80": lambda: dense(8, heads=2, heads_kv=2, width=80, ffn=240),
    "llama-rows-of-288": lambda: dense(6, heads=6, heads_kv=6, width=288, ffn=768),
    "llama-70b": lambda: dense(80, heads_kv=1, only=BY_LAYER),
    "llama-65b": lambda: dense(80, only=BY_LAYER),
    "qwen2": lambda: dense(8, heads=8, heads_kv=2, architecture="qwen2", bias=True, tied=True),
    "qwen2-72b": lambda: dense(80, heads_kv=1, architecture="qwen2", only=BY_LAYER),
    "qwen3": lambda: dense(9, heads=8, heads_kv=2, architecture="qwen3"),
    "gemma2-tied": lambda: dense(9, heads=8, heads_kv=4, architecture="gemma2", tied=True),
    "heads-by-layer": mixed_heads,
    "mixtral": lambda: experts(16, 8),
    "mixtral-separate": separate_experts,
    "two-experts": lambda: experts(8, 2, heads_kv=8),
    "four-experts": lambda: experts(8, 4, heads_kv=8),
    "qwen3moe": lambda: experts(10, 128, architecture="qwen3moe"),
    "qwen2moe": lambda: experts(9, 60, architecture="qwen2moe", shared=True, heads_kv=8),
    "deepseek2": mla,
    "falcon": lambda: fused("falcon", 32),
    "falcon-tied": lambda: fused("falcon", 17, tied=True),
    "phi3": lambda: fused("phi3", 9),
    "mamba": mamba,
    "oddities": oddities,
}
