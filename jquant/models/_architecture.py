"""What all architectures share: how a checkpoint becomes GGUF tensors, lazily, and which keys describe it.

Terms. A *weight* is one tensor of the GGUF file. Its *parts* are the tensors of the checkpoint that it is
made of: one, or one for each expert. *Axes* are named by the config keys that give their lengths, so that a
wrong shape can be traced to a line of config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import gguf
import numpy as np

from jquant.core import FLOAT_DTYPES, TRAINED, MetadataValue, Source, TensorSpec, UserError
from jquant.models import _config
from jquant.models._config import REQUIRED, Config, Rope
from jquant.models._header import Traits

HIDDEN = "hidden_size"
Q_ROWS = "num_attention_heads * head_dim"
KV_ROWS = "num_key_value_heads * head_dim"

# What the config of every decoder here has. Absent: the default of the class in transformers, where the
# classes agree; num_key_value_heads and head_dim then follow from num_attention_heads.
DECODER_KEYS: Mapping[str, object] = {
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "num_key_value_heads": None,
    "head_dim": None,
    "vocab_size": REQUIRED,
    "max_position_embeddings": REQUIRED,
    "rms_norm_eps": REQUIRED,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

# Buffers that old versions of transformers saved; they follow from the config.
_DERIVED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Weight:
    """A tensor of the GGUF file.

    name is what `gguf.get_tensor_name_map` knows it by. rotary: the config key that counts the heads, where
    rows are rotary pairs that llama.cpp wants side by side: row i of a head's first half next to row i of
    its second (transformers keeps the halves apart).
    """

    name: str
    parts: tuple[str, ...]
    axes: tuple[str, ...]  # of one part
    rotary: str | None = None
    stacked: bool = False  # parts along a new first axis
    shift: float = 0.0  # added to a vector, which is then stored as float32


def weight(name: str, *axes: str, rotary: str | None = None) -> Weight:
    return Weight(name, (name,), axes, rotary)


def experts(name: str, *axes: str, count: int) -> Weight:
    """name with "{}" for the expert's number; the GGUF tensor is [experts, rows, columns]."""
    parts = tuple(name.format(expert) for expert in range(count))
    return Weight(name.replace(".{}", ""), parts, axes, stacked=True)


def routed_experts(name: str, count: int) -> Iterator[Weight]:
    """Qwen's router and its experts; `name` is the block's."""
    yield weight(f"{name}.mlp.gate.weight", "num_experts", HIDDEN)
    expert = f"{name}.mlp.experts.{{}}"
    yield experts(f"{expert}.gate_proj.weight", "moe_intermediate_size", HIDDEN, count=count)
    yield experts(f"{expert}.up_proj.weight", "moe_intermediate_size", HIDDEN, count=count)
    yield experts(f"{expert}.down_proj.weight", HIDDEN, "moe_intermediate_size", count=count)


def decoder(config: Config, block: Callable[[str], Iterator[Weight]]) -> Iterator[Weight]:
    """Embedding, blocks, final norm and, unless tied to the embedding, the output matrix."""
    yield weight("model.embed_tokens.weight", "vocab_size", HIDDEN)
    for i in range(config.size("num_hidden_layers")):
        yield from block(f"model.layers.{i}")
    yield weight("model.norm.weight", HIDDEN)
    if not config.flag("tie_word_embeddings"):
        yield weight("lm_head.weight", "vocab_size", HIDDEN)


def attention(
    block: str,
    *,
    rotary_pairs: bool,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
) -> Iterator[Weight]:
    """Norm and self-attention. rotary_pairs: llama.cpp turns neighbouring rows, q and k are reordered."""
    q_heads, k_heads = ("num_attention_heads", "num_key_value_heads") if rotary_pairs else (None, None)
    attn = f"{block}.self_attn"
    yield weight(f"{block}.input_layernorm.weight", HIDDEN)
    for name, rows, rotary in (
        ("q_proj", Q_ROWS, q_heads),
        ("k_proj", KV_ROWS, k_heads),
        ("v_proj", KV_ROWS, None),
    ):
        yield weight(f"{attn}.{name}.weight", rows, HIDDEN, rotary=rotary)
        if qkv_bias:
            yield weight(f"{attn}.{name}.bias", rows, rotary=rotary)
    yield weight(f"{attn}.o_proj.weight", HIDDEN, Q_ROWS)
    if output_bias:
        yield weight(f"{attn}.o_proj.bias", HIDDEN)
    if qk_norm:
        yield weight(f"{attn}.q_norm.weight", "head_dim")
        yield weight(f"{attn}.k_norm.weight", "head_dim")
    yield weight(f"{block}.post_attention_layernorm.weight", HIDDEN)


def mlp(prefix: str, width: str = "intermediate_size", *, bias: bool = False) -> Iterator[Weight]:
    """Gated feed-forward: down(silu(gate x) · up x)."""
    for name, rows, cols in (
        ("gate_proj", width, HIDDEN),
        ("up_proj", width, HIDDEN),
        ("down_proj", HIDDEN, width),
    ):
        yield weight(f"{prefix}.{name}.weight", rows, cols)
        if bias:
            yield weight(f"{prefix}.{name}.bias", rows)


def rope_freqs(rope: Rope, head_dim: int) -> np.ndarray:
    """Llama 3.1's scaling: the factor by which each of the head_dim/2 frequencies is divided, float32.

    With wavelength λ = 2π base^(2i/head_dim) and L the context of the first training: λ < L/high is kept,
    λ > L/low is divided by `factor`, and in between 1/factor is blended linearly in L/λ.
    Source: transformers, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    wavelength = 2 * np.pi * rope.base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    cycles = rope.original_context / wavelength
    span = rope.high_freq_factor - rope.low_freq_factor
    kept = np.clip((cycles - rope.low_freq_factor) / span, 0, 1)  # 1: unscaled, 0: divided by factor
    return (1 / ((1 - kept) / rope.factor + kept)).astype(np.float32)


def sliding_window(config: Config) -> dict[str, MetadataValue]:
    """The header's window, for architectures that attend to the last so many tokens only."""
    window = config.values["sliding_window"]
    return {} if window is None else {"attention.sliding_window": np.uint32(config.size("sliding_window"))}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A class of transformers and the llama.cpp architecture that computes the same function."""

    name: str  # as in config.json's `architectures`: "LlamaForCausalLM"
    gguf: gguf.MODEL_ARCH
    weights: Callable[[Config], Iterator[Weight]] = field(repr=False)
    keys: Mapping[str, object] = field(repr=False)  # config keys read, with their defaults
    only: Mapping[str, tuple[object, ...]] = field(repr=False, default_factory=dict)
    aliases: Mapping[str, str] = field(repr=False, default_factory=dict)  # of keys, other name → the one read
    rope_types: frozenset[str] = frozenset({"default", "linear", "yarn"})
    header: Callable[[Config], Mapping[str, MetadataValue]] = field(repr=False, default=lambda config: {})
    traits: Traits = field(repr=False, default=Traits())
    ignores_window: bool = False  # llama.cpp attends to everything, whatever window the header has

    def read_config(self, config: Mapping[str, object]) -> Config:
        """Raises UserError for a key that is unknown, or whose value llama.cpp cannot honour."""
        return _config.read(
            config,
            architecture=self.name,
            keys=self.keys,
            only=self.only,
            rope_types=self.rope_types,
            window_period=self.traits.window_period,
            aliases=self.aliases,
        )

    def remarks(self, config: Mapping[str, object]) -> tuple[str, ...]:
        """What llama.cpp computes otherwise than transformers, where the two can be told apart."""
        checked = self.read_config(config)
        window = checked.values.get("sliding_window")
        context = checked.size("max_position_embeddings")
        if self.ignores_window and isinstance(window, int) and window < context:
            return (
                f"the model attends to the last {window} tokens; llama.cpp attends to all, so texts of more "
                f"than {window} tokens (it was made for {context}) are continued otherwise than intended.",
            )
        return ()

    def as_gguf(self, source: Source, config: Mapping[str, object]) -> Source:
        """The checkpoint with llama.cpp's names, row order and stacked experts; nothing is read yet.

        Raises UserError for a tensor that is missing, unexpected, or not of the shape the config says.
        """
        checked = self.read_config(config)
        weights = self.named(checked)
        _check_names(self.name, source, weights.values(), tied=checked.flag("tie_word_embeddings"))
        made: dict[str, _Made] = {}
        for name, data in _rope_tensors(checked.rope, checked.size("head_dim")).items():
            made[name] = _Made(TensorSpec(name, data.shape, "F32"), data=data.view(np.uint8)[None])
        for name, entry in weights.items():
            heads = checked.size(entry.rotary) if entry.rotary else 0
            made[name] = _Made(_spec(name, entry, source, checked), entry.parts, heads, entry.shift)
        return _GgufView(source, made)

    def as_stored(self, config: Config, weight: Weight, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Rows of a whole GGUF matrix, or stack, as the tensors of the checkpoint have them: `as_gguf` turned
        round."""
        heads = config.size(weight.rotary) if weight.rotary else 0
        for part, own in zip(weight.parts, np.split(rows, len(weight.parts)), strict=True):
            yield part, _unpair(own, len(own) // heads) if heads else own

    def named(self, config: Config) -> dict[str, Weight]:
        """How each tensor of the GGUF file is made, by its name there."""
        names = gguf.get_tensor_name_map(self.gguf, config.size("num_hidden_layers"))
        found = {}
        for entry in self.weights(config):
            name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
            assert name is not None, f"gguf has no name for {entry.name}; upgrade the package"
            found[name] = entry
        return found

    def metadata(self, config: Mapping[str, object], name: str | None = None) -> dict[str, MetadataValue]:
        """The header's description of the model, with llama.cpp's names and types; `name` is for people."""
        checked = self.read_config(config)
        arch = gguf.MODEL_ARCH_NAMES[self.gguf]
        head_dim = np.uint32(checked.size("head_dim"))
        out: dict[str, MetadataValue] = {"general.architecture": arch, "general.type": "model"}
        if name:
            out["general.name"] = name
        described: dict[str, MetadataValue] = {
            "block_count": np.uint32(checked.size("num_hidden_layers")),
            "context_length": np.uint32(checked.size("max_position_embeddings")),
            "embedding_length": np.uint32(checked.size("hidden_size")),
            "feed_forward_length": np.uint32(checked.size("intermediate_size")),
            "attention.head_count": np.uint32(checked.size("num_attention_heads")),
            "attention.head_count_kv": np.uint32(checked.size("num_key_value_heads")),
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "attention.layer_norm_rms_epsilon": np.float32(checked.number("rms_norm_eps")),
            "vocab_size": np.uint32(checked.size("vocab_size")),
            "rope.dimension_count": np.uint32(checked.size("rotary_dims")),
            **_rope_metadata(checked.rope),
            **self.header(checked),
        }
        for key, config_keys in _EXPERT_KEYS.items():
            for config_key in config_keys:
                if checked.values.get(config_key) is not None:
                    described[key] = np.uint32(checked.size(config_key))
        return out | {f"{arch}.{key}": value for key, value in described.items()}


_EXPERT_KEYS = {
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}


def _rope_tensors(rope: Rope, head_dim: int) -> dict[str, np.ndarray]:
    """What the frequencies are divided by, for scalings that llama.cpp has no formula for: float32."""
    if rope.type == "llama3":
        return {"rope_freqs.weight": rope_freqs(rope, head_dim)}
    if rope.type == "longrope":
        return {
            "rope_factors_long.weight": np.array(rope.long_factors, np.float32),
            "rope_factors_short.weight": np.array(rope.short_factors, np.float32),
        }
    return {}


def _rope_metadata(rope: Rope) -> dict[str, MetadataValue]:
    out: dict[str, MetadataValue] = {"rope.freq_base": np.float32(rope.base)}
    if rope.type in ("linear", "yarn"):  # llama3 is in the rope_freqs tensor
        out["rope.scaling.type"] = rope.type
        out["rope.scaling.factor"] = np.float32(rope.factor)
    if rope.type == "longrope":
        out["rope.scaling.original_context_length"] = np.uint32(rope.original_context)
        out["rope.scaling.attn_factor"] = np.float32(rope.attention_factor)
    if rope.type == "yarn":
        out["rope.scaling.original_context_length"] = np.uint32(rope.original_context)
        # llama.cpp multiplies by YaRN's temperature by itself; what is stored comes on top of that.
        extra = rope.attention_factor / _config.yarn_temperature(rope.factor)
        if extra != 1:
            out["rope.scaling.attn_factor"] = np.float32(extra)
    return out


def _check_names(architecture: str, source: Source, weights: Collection[Weight], *, tied: bool) -> None:
    """Refuse a checkpoint whose tensors are not exactly those that the config implies."""
    expected = dict.fromkeys(part for entry in weights for part in entry.parts)
    missing = [name for name in expected if name not in source.specs]
    if missing:
        hint = " (config.json says tie_word_embeddings is false)" if missing[0] == "lm_head.weight" else ""
        raise UserError(
            f"{missing[0]}{_and_more(missing)} expected by config.json for {architecture}{hint} but not in "
            "the checkpoint; the download may be incomplete, or config.json is another model's."
        )
    spare = {"lm_head.weight"} if tied else set()  # transformers does not read it either
    unexpected = [
        name
        for name in source.specs
        if not (name in expected or name in spare or name.endswith(_DERIVED) or _adds_nothing(name, source))
    ]
    if unexpected:
        raise UserError(
            f"{unexpected[0]}{_and_more(unexpected)} in the checkpoint but unknown to {architecture} with "
            "this config.json; converting without it would change the model."
        )


def _adds_nothing(name: str, source: Source) -> bool:
    """Whether it is a bias of zeros, as AutoGPTQ writes one beside every matrix."""
    return name.endswith(".bias") and not source.read(name).any()


def _and_more(names: list[str]) -> str:
    return " is" if len(names) == 1 else f" and {len(names) - 1} more tensors are"


def _spec(name: str, entry: Weight, source: Source, config: Config) -> TensorSpec:
    """The header entry of a weight; every part must have the shape that the config says, and one type."""
    shape = tuple(config.size(axis) for axis in entry.axes)
    types = {source.specs[part].type for part in entry.parts}
    for part in entry.parts:
        found = source.specs[part].shape
        if found != shape:
            axes = ", ".join(f"{axis} = {size}" for axis, size in zip(entry.axes, shape, strict=True))
            raise UserError(
                f"{part}: config.json implies shape {shape} ({axes}); the checkpoint has {found}. "
                "They belong to different models, or config.json was edited."
            )
    if entry.shift:
        if not types <= set(TRAINED):
            raise UserError(f"{entry.parts[0]}: is stored as {types.pop()}; expected {' or '.join(TRAINED)}.")
        types = {"F32"}
    if len(types) > 1:
        raise UserError(f"{name}: the experts are stored in different types: {', '.join(sorted(types))}.")
    if entry.axes[0] == "1":
        shape = shape[1:]  # to ggml a matrix of one row is a vector
    return TensorSpec(name, (len(entry.parts), *shape) if entry.stacked else shape, types.pop())


@dataclass(frozen=True)
class _Made:
    """How a GGUF tensor is made: from rows of checkpoint tensors, or from data in memory."""

    spec: TensorSpec
    parts: tuple[str, ...] = ()
    heads: int = 0  # rotary heads whose rows are to be paired; 0: rows as they are
    shift: float = 0.0
    data: np.ndarray | None = None  # uint8 [rows, row bytes]


class _GgufView:
    """A Source that renames, reorders and stacks the tensors of another as they are read."""

    def __init__(self, source: Source, made: Mapping[str, _Made]):
        self._source = source
        self._made = made
        self._specs = MappingProxyType({name: entry.spec for name, entry in made.items()})

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        made = self._made[name]
        stop = made.spec.rows if stop is None else stop
        if made.data is not None:
            return made.data[start:stop]
        if made.shift:
            return self._read_shifted(made)[start:stop]
        if made.heads:
            return self._read_paired(made, start, stop)
        rows = made.spec.rows // len(made.parts)  # of one part
        pieces = [
            self._source.read(made.parts[i], max(start - i * rows, 0), min(stop - i * rows, rows))
            for i in range(start // rows, -(-stop // rows))
        ]
        if not pieces:
            return np.empty((0, made.spec.row_bytes), np.uint8)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read_shifted(self, made: _Made) -> np.ndarray:
        (part,) = made.parts
        stored = self._source.read(part).view(FLOAT_DTYPES[self._source.specs[part].type])
        return (stored.astype(np.float32) + np.float32(made.shift)).view(np.uint8)

    def _read_paired(self, made: _Made, start: int, stop: int) -> np.ndarray:
        """Whole heads are read, their rows paired, and the wanted rows kept."""
        (part,) = made.parts
        if len(made.spec.shape) == 1:  # a bias: its elements are what the rows of a matrix are
            row = self._source.read(part, 0, 1).reshape(made.spec.cols, -1)
            return _pair(row, made.spec.cols // made.heads).reshape(1, -1)[start:stop]
        head = made.spec.rows // made.heads
        first, last = start // head * head, -(-stop // head) * head
        return _pair(self._source.read(part, first, last), head)[start - first : stop - first]


def _pair(rows: np.ndarray, head: int) -> np.ndarray:
    """[heads · head, bytes]: the two halves of each head, interleaved row by row."""
    halves = rows.reshape(-1, 2, head // 2, rows.shape[-1])  # [head, half, i, bytes]
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _unpair(rows: np.ndarray, head: int) -> np.ndarray:
    """What `_pair` was given."""
    pairs = rows.reshape(-1, head // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
