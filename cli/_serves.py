"""Which option of `jquant quantize` serves which output, and what it needs to have an effect.

One table, and refusals come from it: an option that would do nothing is a wrong command line. With --dry-run
the options of the run stand that it foretells. Here are names alone, for --help is not to wait for JAX.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperOption

GGUF = "GGUF"
SCHEMES = ("W8A8", "FP8", "W4A16", "GPTQ", "AWQ")
SMOOTHING = "smoothing"  # of W8A8 without --no-smooth: no option, but options need it as they need others
_W8A8, _FOLDERS = frozenset({"W8A8"}), frozenset(SCHEMES)
_GGUF, _BOTH = frozenset({GGUF}), frozenset({GGUF, *SCHEMES})

_SIZES = ("target_size", "target_bpw")
_TARGETS = (*_SIZES, "target_kld")
_OWN_TYPES: dict[str, str] = dict.fromkeys(_TARGETS, "a target chooses the types itself")
_FITTING: dict[str, str] = dict.fromkeys(_TARGETS, "a target takes only types that fit")
_MEASURED = {SMOOTHING: "is measured anyway where W8A8 is smoothed"}
# What runs a model on text.
_RUNS = ("analyze", "feedback", "balance_inputs", "static_activations", SMOOTHING)
_READS = (*_RUNS, "protect_super_weights", "search_seconds", "weighting")
_TEXT = "calibration"  # which needs the same, and is no remedy itself


class Use(NamedTuple):
    serves: frozenset[str]
    needs: tuple[str, ...] = ()  # one of these options, of those that serve the output
    excludes: Mapping[str, str] = {}  # options it does not go with → why


TABLE: Mapping[str, Use] = {
    # Input, and what is written.
    "model": Use(_BOTH),
    "out": Use(_BOTH),
    "type": Use(_BOTH, excludes=_OWN_TYPES | {"like": "--like says what each type is"}),
    "list_types": Use(_BOTH),
    "revision": Use(_BOTH),
    "pre_tokenizer": Use(_BOTH),
    "dry_run": Use(_BOTH),
    "resume": Use(_BOTH),
    "force": Use(_BOTH),
    "max_shard_size": Use(_BOTH),
    "threads": Use(_GGUF),
    "check": Use(_GGUF),
    "export_scales": Use(_FOLDERS),
    "coordinator": Use(_BOTH),
    "processes": Use(_BOTH, needs=("coordinator",)),
    "process": Use(_BOTH, needs=("coordinator",)),
    "json": Use(_BOTH),
    "quiet": Use(_BOTH),
    "verbose": Use(_GGUF, excludes={"json": "--json has the type of every tensor"}),
    # What is measured.
    "imatrix": Use(_BOTH, excludes=_MEASURED),
    "analyze": Use(
        _BOTH, excludes=_MEASURED | {"imatrix": "measures what --imatrix would read; give one of them"}
    ),
    "feedback": Use(_BOTH),
    "balance_inputs": Use(_GGUF),
    _TEXT: Use(_BOTH, needs=(*_READS, "target_kld")),
    "samples": Use(_BOTH, needs=(*_READS, _TEXT)),
    "sequence_length": Use(_BOTH, needs=(*_READS, _TEXT)),
    "seed": Use(_BOTH, needs=(*_READS, _TEXT)),
    "parse_special": Use(_BOTH, needs=(*_READS, _TEXT)),
    "batch": Use(_BOTH, needs=_RUNS),
    # Types of a GGUF file.
    "rule": Use(_GGUF),
    "rules": Use(_GGUF),
    "profile": Use(_GGUF),
    "like": Use(_GGUF, excludes=_OWN_TYPES),
    "pure": Use(_GGUF, excludes=_OWN_TYPES | {"like": "--like says what each type is"}),
    "output_type": Use(_GGUF),
    "embedding_type": Use(_GGUF),
    "no_fallback": Use(_GGUF, excludes=_FITTING),
    "protect_super_weights": Use(_GGUF),
    "protection_type": Use(_GGUF, needs=("protect_super_weights", "profile")),
    "protection_coverage": Use(_GGUF, needs=("protect_super_weights",)),
    "effort": Use(_GGUF),
    "target_size": Use(_GGUF),
    "target_bpw": Use(_GGUF),
    "target_kld": Use(_GGUF),
    "runtime": Use(_GGUF, needs=_TARGETS),
    "sensitivity": Use(_GGUF, needs=_TARGETS),
    "weighting": Use(_GGUF, needs=_TARGETS),
    "search_seconds": Use(_GGUF, needs=_SIZES, excludes={"target_kld": "a search needs a size"}),
    # Folders.
    "keep": Use(_FOLDERS),
    "alpha": Use(_W8A8, needs=(SMOOTHING,)),
    "no_smooth": Use(_W8A8),
    "static_activations": Use(frozenset({"W8A8", "FP8"})),
    "asymmetric_activations": Use(
        _W8A8, excludes={"static_activations": "has one scale for each token, not --static-activations"}
    ),
    "target_error": Use(_W8A8, needs=(SMOOTHING,)),
}
# What other programs call types.
_ELSEWHERE = {
    "INT8": "W8A8 for a folder, Q8_0 for a GGUF file",
    "INT4": "W4A16, GPTQ or AWQ for a folder, Q4_K_M for a GGUF file",
    "FP4": "MXFP4_MOE or NVFP4",
}
# What to use instead, where there is something.
_INSTEAD = {"keep": "see --rule", "rule": "see --keep", "rules": "see --keep"}


def output_of(type: str | None) -> str:
    """The scheme's name, or GGUF."""
    name = (type or "").upper()
    return name if name in SCHEMES else GGUF


def meant(name: str) -> str:
    """What a name that is no type may mean, as a sentence; "" where nothing is known."""
    if (about := _ELSEWHERE.get(name.upper())) is not None:
        return f"give {about}; "
    close = difflib.get_close_matches(name.upper(), SCHEMES, n=1, cutoff=0.7)
    return f"did you mean {close[0]}, which is a folder? " if close else ""


def refuse_others(context: typer.Context, output: str) -> None:
    """Raises BadParameter for options that do not serve the output, or do nothing beside the others."""
    options = {one.name: one for one in context.command.params if one.name}
    written = {name: max(one.opts, key=len) for name, one in options.items()}
    active = [name for name, one in options.items() if _is_active(context, one)]
    facts = {*active, SMOOTHING} if output == "W8A8" and "no_smooth" not in active else {*active}
    for name in active:
        if said := problem(name, output, facts, written):
            raise typer.BadParameter(said, param_hint=written[name])


def problem(name: str, output: str, active: Collection[str], written: Mapping[str, str]) -> str:
    """Why the option would do nothing; "" where it has an effect. active: options that are, and SMOOTHING.
    written: names of options as they are written, where not as their parameters are called."""
    use = TABLE[name]
    if output not in use.serves:
        served = "a GGUF file" if use.serves == _GGUF else _listed([s for s in SCHEMES if s in use.serves])
        instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
        return f"is for {served}, and says nothing of {output}{instead}"
    for other, why in use.excludes.items():
        if other in active and (other not in TABLE or output in TABLE[other].serves):
            return why
    if use.needs and not any(other in active for other in use.needs):
        remedies = [other for other in use.needs if other in TABLE and other != _TEXT]
        useful = [other for other in remedies if output in TABLE[other].serves]
        if SMOOTHING in use.needs and output == "W8A8":
            unless = f", unless there is {_either(useful, written)}" if useful else ""
            return f"does nothing with --no-smooth{unless}"
        return f"does nothing without {_either(useful, written)}"
    return ""


def _is_active(context: typer.Context, option: Any) -> bool:
    """Whether the command line has it, and it changes anything: --search-seconds 0 does not."""
    name = option.name or ""
    source, value = context.get_parameter_source(name), context.params.get(name)
    if source is None or source.name != "COMMANDLINE" or value is None or value is False:
        return False
    return _plain(value) != _plain(option.default)


def _plain(value: object) -> object:
    """A member of an Enum as it is written."""
    return value.value if isinstance(value, Enum) else value


def _either(names: Collection[str], written: Mapping[str, str]) -> str:
    *most, last = [written.get(name, f"--{name.replace('_', '-')}") for name in names]
    return f"{', '.join(most)} or {last}" if most else last


def _listed(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


class Once(TyperCommand):
    """A command that refuses a value which a later one would replace without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=[*args])
        for option in order:
            if not isinstance(option, TyperOption) or option.multiple or order.count(option) == 1:
                continue
            if not option.is_flag or option.secondary_opts:
                hint = max(option.opts, key=len)
                raise typer.BadParameter("is given more than once", ctx=ctx, param_hint=hint)
        return super().parse_args(ctx, args)
