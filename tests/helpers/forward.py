"""A decoder's forward pass in float64 NumPy, from a checkpoint as transformers names it: a test oracle.

Written from the models' papers and the conventions of transformers (rotary halves), sharing nothing with
jquant or llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def logits(config: Mapping, tensors: Mapping[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """[tokens, vocab]: the next token's logits after each of `tokens`."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    given = config.get("rope_parameters") or config
    turned = int(head * given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)))
    positions = np.arange(len(tokens))[:, None]
    scale = attention_factor(config)
    gemma = config["model_type"].startswith("gemma")
    if gemma:
        w |= {name: 1 + tensor for name, tensor in w.items() if name.endswith("norm.weight")}
    x = w["model.embed_tokens.weight"][tokens] * (math.sqrt(config["hidden_size"]) if gemma else 1)
    for i in range(config["num_hidden_layers"]):
        width, local = window(config, i)
        freqs = (
            10000.0 ** (-np.arange(0, head, 2) / head) if local else frequencies(config, turned, len(tokens))
        )
        angles = positions * freqs  # [token, turned/2]
        layer = f"model.layers.{i}."
        p = {name.removeprefix(layer): tensor for name, tensor in w.items() if name.startswith(layer)}
        normed = rmsnorm(x, p["input_layernorm.weight"], config)
        attended = attention(config, p, normed, angles, scale, heads, head, width)
        if gemma:
            x = x + rmsnorm(attended, p["post_attention_layernorm.weight"], config)
            normed = rmsnorm(x, p["pre_feedforward_layernorm.weight"], config)
            fed = mlp(p, "mlp.", normed, activation=gelu)
            x = x + rmsnorm(fed, p["post_feedforward_layernorm.weight"], config)
            continue
        x = x + attended
        normed = rmsnorm(x, p["post_attention_layernorm.weight"], config)
        x = x + (experts(config, p, normed) if "num_experts_per_tok" in config else mlp(p, "mlp.", normed))
    x = rmsnorm(x, w["model.norm.weight"], config)
    return capped(
        x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T, config.get("final_logit_softcapping")
    )


def window(config, i):
    """(tokens that block i attends to, whether it turns its heads as gemma3's blocks with a window do)"""
    kind, width = config["model_type"], config.get("sliding_window")
    if kind.startswith("qwen"):
        return None, False
    if kind.startswith("gemma"):
        period = 6 if kind.startswith("gemma3") else 2
        return (None, False) if (i + 1) % period == 0 else (width, period == 6)
    return width, False


def capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rmsnorm(x, weight, config):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config["rms_norm_eps"]) * weight


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(config, p, x, angles, scale, heads, head, width):
    n = len(x)
    if "self_attn.qkv_proj.weight" in p:
        rows = heads * head, config["num_key_value_heads"] * head
        parts = np.split(p["self_attn.qkv_proj.weight"], (rows[0], rows[0] + rows[1]))
        p |= {f"self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}

    def split(name, norm=None):
        y = linear(p, f"self_attn.{name}", x).reshape(n, -1, head)
        return rmsnorm(y, p[f"self_attn.{norm}.weight"], config) if f"self_attn.{norm}.weight" in p else y

    q, k, v = split("q_proj", "q_norm"), split("k_proj", "k_norm"), split("v_proj")
    q, k = (rotate(y, angles, scale) for y in (q, k))
    k, v = (np.repeat(y, heads // y.shape[1], axis=1) for y in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(head)
    scores = capped(scores, config.get("attn_logit_softcapping"))
    behind = np.arange(n)[:, None] - np.arange(n)
    scores = np.where((behind >= 0) & (behind < (width or n)), scores, -np.inf)
    out = np.einsum("hij,jhd->ihd", softmax(scores), v)
    return linear(p, "self_attn.o_proj", out.reshape(n, -1))


def rotate(x, angles, scale=1.0):
    """The two halves of what is turned of a head are the real and imaginary parts of its pairs."""
    turned, rest = np.split(x, [2 * angles.shape[-1]], axis=-1)
    a, b = np.split(turned, 2, axis=-1)
    cos, sin = scale * np.cos(angles)[:, None], scale * np.sin(angles)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def mlp(p, prefix, x, names=("gate_proj", "up_proj", "down_proj"), activation=silu):
    if f"{prefix}gate_up_proj.weight" in p:
        gate, up = np.split(linear(p, f"{prefix}gate_up_proj", x), 2, axis=-1)
        return linear(p, f"{prefix}down_proj", silu(gate) * up)
    gate, up, down = (f"{prefix}{name}" for name in names)
    return linear(p, down, activation(linear(p, gate, x)) * linear(p, up, x))


def experts(config, p, x):
    mixtral = "block_sparse_moe.gate.weight" in p
    prefix, names = (
        ("block_sparse_moe.", ("w1", "w3", "w2"))
        if mixtral
        else ("mlp.", ("gate_proj", "up_proj", "down_proj"))
    )
    weights = softmax(linear(p, f"{prefix}gate", x))
    out = np.zeros_like(x)
    for i, row in enumerate(weights):
        best = np.argsort(-row)[: config["num_experts_per_tok"]]
        total = row[best].sum() if config.get("norm_topk_prob", mixtral) else 1
        for e in best:
            out[i] += row[e] / total * mlp(p, f"{prefix}experts.{e}.", x[i], names)
    if "mlp.shared_expert_gate.weight" in p:
        gate = 1 / (1 + np.exp(-linear(p, "mlp.shared_expert_gate", x)))
        out += gate * mlp(p, "mlp.shared_expert.", x)
    return out


def rope(config) -> dict:
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    given = dict(given.get("full_attention", given))
    given.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    given["rope_type"] = given.get("rope_type", given.get("type", "default"))
    return given


def frequencies(config, head, n=1):
    r = rope(config)
    freqs = r["rope_theta"] ** (-np.arange(0, head, 2) / head)
    if r["rope_type"] in ("longrope", "su"):
        kind = "long" if n > config["original_max_position_embeddings"] else "short"
        return freqs / np.array(r[f"{kind}_factor"])
    if r["rope_type"] == "linear":
        return freqs / r["factor"]
    if r["rope_type"] == "llama3":
        old, low, high = (
            r[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        out = []
        for f in freqs:
            wavelength = 2 * math.pi / f
            if wavelength < old / high:
                out.append(f)
            elif wavelength > old / low:
                out.append(f / r["factor"])
            else:
                smooth = (old / wavelength - low) / (high - low)
                out.append((1 - smooth) * f / r["factor"] + smooth * f)
        return np.array(out)
    if r["rope_type"] == "yarn":
        old, base = r["original_max_position_embeddings"], r["rope_theta"]
        low, high = (
            head * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(base)) for rotations in (32, 1)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), head - 1)
        ramp = np.clip((np.arange(head // 2) - low) / max(high - low, 0.001), 0, 1)
        return freqs / r["factor"] * ramp + freqs * (1 - ramp)
    return freqs


def attention_factor(config):
    r = rope(config)
    if r["rope_type"] in ("longrope", "su"):
        first = config["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(config["max_position_embeddings"] / first) / math.log(first))
    if r["rope_type"] != "yarn":
        return 1.0
    return r.get("attention_factor", 0.1 * math.log(r["factor"]) + 1)
