"""config.json, read with suspicion: a key that would be lost on the way to llama.cpp is refused by name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jquant.core import UserError

_LARGEST = 3.4e38  # a float32, as headers have it
_TOO_LARGE = 1 << 31  # for what llama.cpp reads of a header
REQUIRED = "required"  # in place of a default: the key must be there

# Keys that say nothing about the function the model computes: training, generation, bookkeeping. Special
# token ids belong to the tokenizer, which reads them itself.
# fmt: off
IGNORABLE = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cls_token_id",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "hidden_dropout", "id2label",
    "initializer_range", "is_llama_config", "label2id", "length_penalty", "mask_token_id",
    "max_length", "max_sequence_length", "min_length", "model_type", "neftune_noise_alpha",
    "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
    "resid_pdrop", "residual_dropout", "return_dict", "return_dict_in_generate", "router_aux_loss_coef",
    "router_jitter_noise", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unk_token_id",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
})
# fmt: on

# Keys that may stand in any config as long as they ask for nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "hidden_act": ("silu", "swish"),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (None, 1, 1.0),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
}

_READ_HERE = ("layer_types", "rope_theta", "rope_scaling", "rope_parameters")
_ROPE_KEYS: Mapping[str, Collection[str]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (
        *("short_factor", "long_factor", "factor", "original_max_position_embeddings", "attention_factor"),
    ),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"),
        *("beta_fast", "beta_slow", "truncate", "extrapolation_factor", "finetuned"),
    ),
}
# llama.cpp reads no other values of these for our architectures (llama-model.cpp, load_hparams).
_ROPE_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "extrapolation_factor": 1}
_ROPE_FIXED |= {"partial_rotary_factor": 1}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding: the angle of pair i at position p is p · base^(−2i/rotary_dims), then scaled."""

    base: float
    type: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0  # yarn and longrope: q and k are multiplied by it
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the frequencies up to original_context
    long_factors: tuple[float, ...] = ()  # and beyond


@dataclass(frozen=True)
class Config:
    """config.json after the checks: absent keys have the default of the model's class in transformers."""

    values: Mapping[str, object]
    rope: Rope

    def size(self, axis: str) -> int:
        """The length of an axis, given as config keys: "num_attention_heads * head_dim + …", or as "1"."""
        if axis == "1":
            return 1
        terms = [term.split(" * ") for term in axis.split(" + ")]
        return sum(math.prod(_integer(self.values, key) for key in term) for term in terms)

    def flag(self, key: str) -> bool:
        value = self.values[key]
        if not isinstance(value, bool):
            raise _bad(key, value, "true or false")
        return value

    def number(self, key: str) -> float:
        return _number(self.values, key)


def read(
    config: Mapping[str, object],
    *,
    architecture: str,
    keys: Mapping[str, object],
    only: Mapping[str, tuple[object, ...]],
    rope_types: Collection[str],
    window_period: int = 0,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Config:
    """Check `config` and fill in defaults.

    keys: what the architecture reads, with the default of its class or REQUIRED. only: keys for which
    llama.cpp computes one thing, with the values that ask for it. window_period: one block in so many attends
    to everything, the others to a sliding window; 0: all to everything. aliases: names that some version of
    transformers writes in place of a key, that name → the key.

    Raises UserError naming the key, its value and, where there is one, the remedy.
    """
    config = _under_one_name(config, aliases)
    only = {**{key: allowed for key, allowed in NEUTRAL.items() if key not in keys}, **only}
    values = {key: default if config.get(key) is None else config[key] for key, default in keys.items()}
    for key, value in values.items():
        if value is REQUIRED:
            raise UserError(f"config.json: {architecture} needs {key!r}, which is missing.")
    _refuse_unknown(config, architecture, {*keys, *only, *_READ_HERE})
    for key, allowed in only.items():
        value = values.get(key, config.get(key, allowed[0]))
        if value not in allowed:
            raise _unsupported(key, value, architecture, allowed)
    _check_layer_types(config, architecture, window_period)
    _fill_heads(values)
    _fill_rotary_dims(values, config.get("rope_parameters") or {})
    return Config(values, _read_rope(config, values, rope_types))


def _under_one_name(config: Mapping[str, object], aliases: Mapping[str, str]) -> Mapping[str, object]:
    renamed = dict(config)
    for other, key in aliases.items():
        value = renamed.pop(other, None)
        if value is not None and renamed.setdefault(key, value) != value:
            raise UserError(
                f"config.json: {other!r} is {_short(value)}, but {key!r} is {_short(renamed[key])}; "
                "they name one thing, so delete the one that is wrong."
            )
    return renamed


def _check_layer_types(config: Mapping[str, object], architecture: str, period: int) -> None:
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise _bad("layer_types", layer_types, "a list")
    for i, type in enumerate(layer_types):
        wanted = "sliding_attention" if period and i % period < period - 1 else "full_attention"
        if type != wanted:
            raise _unsupported("layer_types", layer_types, architecture, (wanted,))


def _refuse_unknown(config: Mapping[str, object], architecture: str, known: set[str]) -> None:
    """Keys that no one knows. One that is null, off or private ("_flash_attn_2_enabled") asks for nothing."""
    unknown = sorted(
        key
        for key, value in config.items()
        if not (key in known or key in IGNORABLE or value is None or value is False or key[0] == "_")
    )
    if unknown:
        listed = ", ".join(f"{key!r} = {_short(config[key])}" for key in unknown)
        raise UserError(
            f"config.json: not handled for {architecture}: {listed}. The converted model might compute "
            "something else; if a key has no effect on this model, delete it from config.json."
        )


def _unsupported(key: str, value: object, architecture: str, allowed: tuple[object, ...]) -> UserError:
    if key == "quantization_config":
        return UserError(
            f"config.json: {key!r} = {_short(value)}: this checkpoint is already quantized; "
            "convert the 16-bit original instead."
        )
    wanted = " or ".join(dict.fromkeys(_short(a) for a in allowed))
    return UserError(
        f"config.json: {key!r} = {_short(value)} is not supported for {architecture}: "
        f"llama.cpp computes it as {wanted}."
    )


def _fill_heads(values: dict[str, object]) -> None:
    """Derive the head sizes that a config may leave out, as transformers does."""
    heads = _integer(values, "num_attention_heads")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None:
        hidden = _integer(values, "hidden_size")
        if hidden % heads:
            raise UserError(
                f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}, "
                "and head_dim is missing."
            )
        values["head_dim"] = hidden // heads
    if heads % _integer(values, "num_key_value_heads"):
        raise UserError(
            f"config.json: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {values['num_key_value_heads']}."
        )
    if _integer(values, "head_dim") % 2:
        raise _bad("head_dim", values["head_dim"], "even: rotary embedding turns pairs")


def _fill_rotary_dims(values: dict[str, object], rope_parameters: object) -> None:
    """How many rows of a head are turned, where a part of them may be: transformers 5 says so elsewhere."""
    part = 1.0
    if "partial_rotary_factor" in values:
        if isinstance(rope_parameters, Mapping) and "partial_rotary_factor" in rope_parameters:
            values["partial_rotary_factor"] = rope_parameters["partial_rotary_factor"]
        part = _number(values, "partial_rotary_factor")
    dims = int(_integer(values, "head_dim") * part)
    if not 0 < part <= 1 or dims % 2 or not dims:
        raise _bad("partial_rotary_factor", part, "a share of head_dim that is an even number of rows")
    values["rotary_dims"] = dims


def _read_rope(
    config: Mapping[str, object], values: Mapping[str, object], supported: Collection[str]
) -> Rope:
    """`rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (transformers 5)."""
    scaling: dict[str, object] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key) or {}
        if not isinstance(given, Mapping):
            raise _bad(key, given, "a table or null")
        given = _of_full_attention(given)
        for name, value in given.items():
            if value is not None and scaling.setdefault(str(name), value) != value:
                raise UserError(
                    f"config.json: 'rope_scaling' and 'rope_parameters' differ in {name!r}: "
                    f"{_short(scaling[str(name)])} and {_short(value)}; delete the one that is wrong."
                )
    default = values.get("rope_theta") if config.get("rope_theta") is None else config["rope_theta"]
    base = _number({"rope_theta": scaling.pop("rope_theta", default)}, "rope_theta")
    old_type = scaling.pop("type", "default")
    type = scaling.pop("rope_type", old_type)
    type = "longrope" if type == "su" else type  # its name in the first Phi-3
    if not isinstance(type, str) or type not in supported:
        raise UserError(
            f"config.json: rope scaling {type!r} is not supported; supported: {', '.join(sorted(supported))}."
        )
    for key, fixed in _ROPE_FIXED.items():
        if key not in values and scaling.get(key, fixed) != fixed:
            raise UserError(
                f"config.json: rope scaling {type!r} with {key!r} = {_short(scaling[key])}: "
                f"llama.cpp can only compute {key} = {_short(fixed)}."
            )
    unknown = sorted(scaling.keys() - set(_ROPE_KEYS[type]) - {"partial_rotary_factor"})
    if unknown:
        listed = ", ".join(f"{key!r} = {_short(scaling[key])}" for key in unknown)
        raise UserError(f"config.json: rope scaling {type!r} has keys that are not handled: {listed}.")
    if type == "default":
        return Rope(base=base)
    if type == "longrope":
        return _read_longrope(base, scaling, values)
    if "factor" not in scaling:
        raise UserError(f"config.json: rope scaling {type!r} needs 'factor', which is missing.")
    scaling.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    factor = _number(scaling, "factor")
    return Rope(
        base=base,
        type=type,
        factor=factor,
        original_context=_integer(scaling, "original_max_position_embeddings"),
        low_freq_factor=_number({"low_freq_factor": 1.0, **scaling}, "low_freq_factor"),
        high_freq_factor=_number({"high_freq_factor": 4.0, **scaling}, "high_freq_factor"),
        attention_factor=_yarn_attention(factor, scaling) if type == "yarn" else 1.0,
    )


def _of_full_attention(given: Mapping[str, object]) -> Mapping[str, object]:
    """transformers 5 has a table for each kind of block; llama.cpp fixes those of blocks with a window."""
    full, sliding = given.get("full_attention"), given.get("sliding_attention")
    if not isinstance(full, Mapping):
        return given
    if sliding != {"rope_type": "default", "rope_theta": 10000.0}:
        raise UserError(
            f"config.json: rope_parameters of 'sliding_attention' are {_short(sliding)}; "
            "llama.cpp computes it with base 10000 and without scaling."
        )
    return full


def _read_longrope(base: float, scaling: Mapping[str, object], values: Mapping[str, object]) -> Rope:
    """Phi-3's two sets of divisors. Source: transformers, _compute_longrope_parameters."""
    longest = _integer(values, "max_position_embeddings")
    name = "original_max_position_embeddings"
    first = scaling.get(name, values.get(name))
    original = longest if first is None else _integer({name: first}, name)
    factor = _number(scaling, "factor") if "factor" in scaling else longest / original
    pairs = _integer(values, "rotary_dims") // 2
    factors = {}
    for key in ("short_factor", "long_factor"):
        given = scaling.get(key)
        if not isinstance(given, list) or len(given) != pairs:
            raise _bad(key, given, f"a list of {pairs} numbers, one for each pair that is turned")
        factors[key] = tuple(_number({key: value}, key) for value in given)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        base=base,
        type="longrope",
        original_context=original,
        attention_factor=_number({"attention_factor": usual, **scaling}, "attention_factor"),
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN's √(1/t) = 0.1 m ln s + 1, by which q and k are multiplied (Peng et al. 2023, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention(factor: float, scaling: Mapping[str, object]) -> float:
    if "attention_factor" in scaling:
        return _number(scaling, "attention_factor")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        upper, lower = _number(scaling, "mscale"), _number(scaling, "mscale_all_dim")
        return yarn_temperature(factor, upper) / yarn_temperature(factor, lower)
    return yarn_temperature(factor)


def _integer(values: Mapping[str, object], key: str) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _TOO_LARGE:
        raise _bad(key, value, f"a positive whole number below {_TOO_LARGE}")
    return value


def _number(values: Mapping[str, object], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise _bad(key, value, "a positive number")
    return float(value)


def _bad(key: str, value: object, wanted: str) -> UserError:
    return UserError(f"config.json: {key!r} must be {wanted}; got {_short(value)}.")


def _short(value: object) -> str:
    """A value for an error message of one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
