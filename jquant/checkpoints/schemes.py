"""Schemes of folders: the format of linear layers' weights, and how their inputs are rounded.

compressed-tensors:

    {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {…}, "input_activations": {…} or null}}}

GPTQ and AWQ, see `transposed`:

    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true, "dynamic": {…}}
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm",
     "modules_to_not_convert": ["lm_head"]}

This is `quantization_config` in config.json, which vLLM and transformers read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from jquant.checkpoints.gptq_awq import Layout
from jquant.core import ScaledFormat, UserError
from jquant.formats import SCALED_FORMATS

# How the inputs of matrices are rounded; see `int8.rounding`.
InputKind = Literal["int8", "fp8", "int8-asymmetric"]

METHOD = "compressed-tensors"
TRANSPOSED = ("gptq", "awq")  # methods of `transposed`
METHODS = (METHOD, *TRANSPOSED)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    name: str  # as on the command line
    weights: ScaledFormat
    activations: InputKind | None
    static: bool = False  # inputs by one scale a matrix, which is stored; else each token by its own
    layout: str  # compressed-tensors' name of the format, or another method's
    about: str

    @property
    def asymmetric(self) -> bool:
        """Whether the codes of inputs have a zero."""
        return self.activations == "int8-asymmetric"

    @property
    def smooths(self) -> bool:
        """Whether outliers of inputs are worth moving into weights: integers have few levels for the rest."""
        return self.activations in ("int8", "int8-asymmetric")

    @property
    def transposed(self) -> Layout | None:
        """How the weights are stored, where not as compressed-tensors has them."""
        if self.layout == "gptq":
            return Layout("gptq", self.weights.group_size, zeros_less=1)
        return Layout("awq", self.weights.group_size, zeros_less=0) if self.layout == "awq" else None


_INT8, _FP8, _INT4, _UINT4 = (SCALED_FORMATS[name] for name in ("INT8", "FP8", "INT4", "UINT4"))
_SCHEMES = (
    Scheme(
        name="W8A8",
        weights=_INT8,
        activations="int8",
        layout="int-quantized",
        about="weights and inputs of linear layers as 8-bit integers; a folder for vLLM and transformers",
    ),
    Scheme(
        name="FP8",
        weights=_FP8,
        activations="fp8",
        layout="float-quantized",
        about="weights and inputs of linear layers as 8-bit floats (e4m3); such a folder",
    ),
    Scheme(
        name="W4A16",
        weights=_INT4,
        activations=None,
        layout="pack-quantized",
        about="weights of linear layers as 4-bit integers in groups of 128; such a folder",
    ),
    Scheme(
        name="GPTQ",
        weights=_INT4,
        activations=None,
        layout="gptq",
        about="the same integers in GPTQ's layout",
    ),
    Scheme(
        name="AWQ",
        weights=_UINT4,
        activations=None,
        layout="awq",
        about="weights as 4-bit integers with a zero for each group of 128, in AWQ's layout",
    ),
)
SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in _SCHEMES})
GROUP_SIZES = (128, 64, 32)  # that runtimes have kernels for, best first


def fitting(scheme: Scheme, widths: Iterable[int]) -> Scheme:
    """The scheme with the largest groups that divide all rows.

    Raises UserError where none does. widths: columns of the matrices.
    """
    if scheme.weights.group_size is None:
        return scheme
    widths = sorted(set(widths))
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return replace(scheme, weights=replace(scheme.weights, group_size=size))
    odd = next(width for width in widths if width % GROUP_SIZES[-1])
    raise UserError(
        f"{scheme.name}: rows of {odd} weights are no multiple of {GROUP_SIZES[-1]}, the smallest group that "
        "runtimes read; leave these matrices out with keep=…, or choose W8A8."
    )


def config_of(scheme: Scheme, ignore: Iterable[str]) -> dict[str, object]:
    """`quantization_config`. ignore: modules that stay as they are, by name."""
    format = scheme.weights
    if scheme.layout == "gptq":
        # A runtime leaves "lm_head" alone by itself, and these by their names.
        left = {rf"-:^{re.escape(name)}$": {} for name in sorted(ignore) if name != "lm_head"}
        facts = {"desc_act": False, "static_groups": False, "sym": True, "true_sequential": True}
        size = {"bits": format.bits, "group_size": format.group_size, "lm_head": False}
        return {"quant_method": "gptq", "checkpoint_format": "gptq", **size, **facts, "dynamic": left}
    if scheme.layout == "awq":
        size = {"bits": format.bits, "group_size": format.group_size, "zero_point": True, "version": "gemm"}
        return {"quant_method": "awq", **size, "modules_to_not_convert": sorted(ignore)}
    kind = "float" if scheme.activations == "fp8" else "int"
    weights = {
        "num_bits": format.bits,
        "type": kind,
        "symmetric": True,
        "strategy": "channel" if format.group_size is None else "group",
        "group_size": format.group_size,
        "dynamic": False,
        "block_structure": None,
        "actorder": None,
    }
    by = {"strategy": "tensor", "dynamic": False} if scheme.static else {"strategy": "token", "dynamic": True}
    inputs = {"num_bits": 8, "type": kind, "symmetric": not scheme.asymmetric, **by}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if scheme.activations else None,
        "output_activations": None,
    }
    return {
        "quant_method": METHOD,
        "format": scheme.layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(ignore),
        "config_groups": {"group_0": group},
    }


def asymmetric(scheme: Scheme) -> Scheme:
    """The scheme with inputs whose codes have a zero, where it has integers."""
    return replace(scheme, activations="int8-asymmetric") if scheme.activations == "int8" else scheme


def layout_of(config: Mapping[str, object]) -> Layout:
    """How the weights are stored that a `quantization_config` of GPTQ or AWQ declares.

    Raises UserError for what is not read here: other than 4 bits, other versions, a mixture of settings.
    """
    method, bits, group = (config.get(key) for key in ("quant_method", "bits", "group_size"))
    gptq = method == "gptq"
    version = str(config.get("checkpoint_format", "gptq") if gptq else config.get("version", "gemm")).lower()
    less = {"gptq": 1, "gptq_v2": 0} if gptq else {"gemm": 0}
    rules = config.get("dynamic") or {}
    mixed = not isinstance(rules, Mapping) or any(not str(rule).startswith("-:") for rule in rules)
    if version in less and bits == 4 and not mixed and isinstance(group, int) and (group > 0 or group == -1):
        return Layout("gptq" if gptq else "awq", group if group > 0 else None, less[version])
    raise UserError(
        f"config.json: 'quantization_config' of {method!r}, version {version!r}, {bits} bits, group size "
        f"{group}{', a mixture' if mixed else ''} is none that is known here: 4 bits in groups of one size, "
        f"{' or '.join(less)}; use the 16-bit original."
    )


def scheme_of(config: Mapping[str, object]) -> Scheme:
    """The scheme that a `quantization_config` declares.

    Raises UserError for one that is none of ours.
    """
    transforms = _path(config, "transform_config", "config_groups")
    if transforms:
        named = ", ".join(transforms) if isinstance(transforms, Mapping) else repr(transforms)
        raise UserError(
            f"config.json: 'transform_config' of 'quantization_config' ({named}) rotates the inputs of "
            "matrices while the model runs, and weights without that are those of no model; use the 16-bit "
            "original."
        )
    layout = config.get("format")
    for scheme in SCHEMES.values():
        if scheme.layout != layout:
            continue
        group = _path(config, "config_groups", "group_0", "weights", "group_size")
        if scheme.weights.group_size is not None:
            if not isinstance(group, int) or group <= 0:
                break
            scheme = replace(scheme, weights=replace(scheme.weights, group_size=group))
        # What else it says must be what we would say.
        for made in (scheme, replace(scheme, static=True), asymmetric(scheme)):
            if _facts(config.get("config_groups")) == _facts(config_of(made, ())["config_groups"]):
                return made
    raise UserError(
        f"config.json: 'quantization_config' of {config.get('quant_method')!r}, format {layout!r}, is none "
        f"that is known here ({', '.join(SCHEMES)}); use the 16-bit original."
    )


def _path(value: object, *keys: str) -> object:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


_COUNT = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder")


def _facts(groups: object) -> object:
    """What the groups say that changes the result, absent and null alike."""
    if not isinstance(groups, Mapping):
        return None
    return [
        (_path(group, "targets"), *(_fact(group, kind, key) for kind in _KINDS for key in _COUNT))
        for group in groups.values()
    ]


def _fact(group: object, kind: str, key: str) -> object:
    value = _path(group, kind, key)
    # In which order a rounding went over the columns; the layout is that of none.
    return None if key == "actorder" and value in ("static", "weight") else value


_KINDS = ("weights", "input_activations", "output_activations")
