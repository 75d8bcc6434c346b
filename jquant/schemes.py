"""Schemes of compressed-tensors: the format of linear layers' weights, and how their inputs are rounded.

    {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {…}, "input_activations": {…} or null}}}

This is `quantization_config` in config.json, which vLLM and transformers read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from jquant.core import ScaledFormat, UserError
from jquant.formats import SCALED_FORMATS

# How the inputs of matrices are rounded; see `activations`.
Activations = Literal["int8", "fp8"]

METHOD = "compressed-tensors"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    name: str  # as on the command line
    weights: ScaledFormat
    activations: Activations | None
    static: bool = False  # inputs by one scale a matrix, which is stored; else each token by its own
    layout: str  # compressed-tensors' name of the format
    about: str


_INT8, _FP8, _INT4 = (SCALED_FORMATS[name] for name in ("INT8", "FP8", "INT4"))
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
        "runtimes read; leave these matrices out with --keep, or choose W8A8."
    )


def config_of(scheme: Scheme, ignore: Iterable[str]) -> dict[str, object]:
    """`quantization_config`. ignore: modules that stay as they are, by name."""
    format = scheme.weights
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
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, **by}
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


def scheme_of(config: Mapping[str, object]) -> Scheme:
    """The scheme that a `quantization_config` declares.

    Raises UserError for one that is none of ours.
    """
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
        for made in (scheme, replace(scheme, static=True)):
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
        (_path(group, "targets"), *(_path(group, kind, key) for kind in _KINDS for key in _COUNT))
        for group in groups.values()
    ]


_KINDS = ("weights", "input_activations", "output_activations")
