"""Profiles: what a user wants of the types of a model, as a TOML file.

    about = "Eight bits for attention, few for the rest."
    file_type = "Q3_K_M"        # the mixture to start from, where the command names none
    min = "IQ2_XXS"             # bounds of every tensor that no rule speaks of
    max = "Q6_K"
    candidates = ["Q2_K", …]    # types that a target size may choose from

    [[rule]]                    # the first rule that holds for a tensor settles it
    match = 'attn_(v|output)'   # a regex; and/or
    role = "attention"          # attention, mlp, expert, embedding, output, or a list of these; and/or
    layers = ["first 2", "last 10%"]
    type = "Q8_0"               # this type, or bounds:
    # min = "Q4_K"
    # max = "Q6_K"

    [[protect]]                 # a super weight of the layer's ffn_down
    layer = 1
    row = 2070
    column = 7310

Bounds are compared by bits per weight.
"""

from __future__ import annotations

import difflib
import importlib.resources
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jquant.core import TensorSpec, UserError, bits_per_weight
from jquant.plan.file_types import file_type
from jquant.plan.rules import check_pattern, tensor_type
from jquant.plan.selection import ROLES, Selection, parse_layers

if sys.version_info >= (3, 11):
    from importlib.resources.abc import Traversable

    import tomllib
else:
    from importlib.abc import Traversable

    import tomli as tomllib  # pyright: ignore[reportMissingImports]

_KEYS = ("about", "file_type", "min", "max", "candidates", "rule", "protect")
_RULE_KEYS = ("match", "role", "layers", "type", "min", "max")
_PROTECT_KEYS = ("layer", "row", "column")


class Bounds(NamedTuple):
    """Types that a tensor may have: exactly `type`, or those between `minimum` and `maximum`."""

    type: str | None = None
    minimum: str | None = None
    maximum: str | None = None
    origin: str = ""  # for reasons and errors

    def violation(self, type: str) -> str | None:
        """Which bound a type breaks, in words; None where it breaks none."""
        bpw = bits_per_weight(type)
        if self.type is not None and type != self.type:
            return f"{self.origin}: {self.type}"
        if self.minimum is not None and bpw < bits_per_weight(self.minimum):
            return f"{self.origin}: at least {self.minimum}"
        if self.maximum is not None and bpw > bits_per_weight(self.maximum):
            return f"{self.origin}: at most {self.maximum}"
        return None

    def nearest(self, type: str) -> str:
        """The type itself, or the bound that it breaks."""
        if self.type is not None:
            return self.type
        if self.minimum is not None and bits_per_weight(type) < bits_per_weight(self.minimum):
            return self.minimum
        if self.maximum is not None and bits_per_weight(type) > bits_per_weight(self.maximum):
            return self.maximum
        return type


_UNBOUNDED = Bounds()


class ProfileRule(NamedTuple):
    selection: Selection
    bounds: Bounds


class WeightPosition(NamedTuple):
    """One weight of the down projection of a layer."""

    layer: int
    row: int
    column: int


@dataclass(frozen=True)
class Profile:
    name: str
    about: str = ""
    file_type: str | None = None
    bounds: Bounds = _UNBOUNDED  # of tensors that no rule speaks of
    candidates: tuple[str, ...] = ()  # empty: the usual ones
    rules: tuple[ProfileRule, ...] = ()
    protect: tuple[WeightPosition, ...] = ()

    def bounds_of(self, specs: Iterable[TensorSpec], layers: int, *, is_tied: bool) -> dict[str, Bounds]:
        """The bounds of each of these tensors, which may all be quantized. layers: of the model.

        Raises UserError, with file and line, for a rule that holds for none of them, or only for tensors
        that rules above it have settled.
        """
        found: dict[str, Bounds] = {}
        names = [spec.name for spec in specs]
        for rule in self.rules:
            held = [name for name in names if rule.selection.holds(name, layers, is_tied=is_tied)]
            if not held:
                example = ", ".join(names[:2])
                raise UserError(
                    f"{rule.bounds.origin}: {rule.selection} is no tensor of this model that is quantized "
                    f"(it has {layers} layers and such names as {example}); change or remove the rule."
                )
            new = [name for name in held if name not in found]
            if not new:
                raise UserError(
                    f"{rule.bounds.origin}: rules above it have settled all that it selects "
                    f"({rule.selection}); put it first, or remove it."
                )
            found |= dict.fromkeys(new, rule.bounds)
        return {name: found.get(name, self.bounds) for name in names}


def preset_names() -> list[str]:
    names = [file.name for file in _presets().iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def _presets() -> Traversable:
    return importlib.resources.files("jquant.plan") / "profiles"


def preset_text(name: str) -> str:
    """The TOML of a preset. Raises UserError, with the close names, where there is none."""
    if name not in preset_names():
        close = difflib.get_close_matches(name, preset_names(), n=2, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else f"presets: {', '.join(preset_names())}."
        raise UserError(f"profile {name!r}: neither a file nor a preset; {hint}")
    return (_presets() / f"{name}.toml").read_text(encoding="utf-8")


def profile_text(name: str | os.PathLike[str]) -> str:
    """The TOML of a file, where there is one of that name, else of the preset. UserError where neither is."""
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        return preset_text(str(name))
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"profile {name}: cannot be read ({error}).") from None


def read_profile(name: str | os.PathLike[str]) -> Profile:
    """A file's or a preset's. Raises UserError for what is neither, and for a profile that is not sound."""
    return parse_profile(profile_text(name), str(name))


def parse_profile(text: str, where: str) -> Profile:
    """The profile that a TOML text describes. where: a file or preset, for errors, which add the line.

    Raises UserError for what is no TOML, for a key, type, role or range that is unknown, and for bounds that
    contradict one another.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = f", line {found[1] if found else max(len(text.splitlines()), 1)}"  # else: at the end
        words = re.sub(r"\s*\(at .*\)", "", str(error))
        raise UserError(f"{where}{line}: not valid TOML: {words}.") from None
    reader = _Reader(text, where)
    reader.check_keys(data, _KEYS, "", 0)
    file_type_name = reader.string(data, "file_type", "", 0)
    if file_type_name is not None:
        with_line = reader.at("", 0, "file_type")
        try:
            file_type_name = file_type(file_type_name).name
        except UserError as error:
            raise UserError(f"{with_line}: {error}") from None
    whole = reader.bounds(data, "", 0, f"profile {where}")
    rules = [reader.rule(table, i) for i, table in enumerate(reader.tables(data, "rule"))]
    for i, rule in enumerate(rules):
        if any(rule.selection == other.selection for other in rules[:i]):
            raise UserError(
                f"{reader.at('rule', i)}: an earlier rule selects the same tensors ({rule.selection}); "
                "remove one of the two."
            )
    protect = [reader.position(table, i) for i, table in enumerate(reader.tables(data, "protect"))]
    candidates = reader.strings(data, "candidates", "", 0)
    made = Profile(
        where,
        reader.string(data, "about", "", 0) or "",
        file_type_name,
        whole,
        tuple(tensor_type(name, reader.at("", 0, "candidates")) for name in candidates),
        tuple(rules),
        tuple(protect),
    )
    reader.check_candidates(made)
    return made


class _Reader(NamedTuple):
    """Values of a parsed TOML, checked, and the lines that they come from: the parser does not tell them."""

    text: str
    where: str

    def at(self, table: str, i: int, key: str = "") -> str:
        """ "FILE, line N": of the i-th [[table]], or of a key in it; table "" is the head of the file."""
        lines = self.text.splitlines()
        begin = re.compile(r"\s*\[\[\s*(\w+)\s*\]\]")
        starts = [(n, found[1]) for n, line in enumerate(lines) if (found := begin.match(line))]
        here = [n for n, name in starts if name == table]
        first = here[i] if table and i < len(here) else 0
        last = next((n for n, _ in starts if n > first or (not table and n >= first)), len(lines))
        own = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
        number = next((n for n in range(first, last) if key and own.match(lines[n])), first)
        return f"{self.where}, line {number + 1}"

    def check_keys(self, data: Mapping, known: Sequence[str], table: str, i: int) -> None:
        for key in data:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}."
                raise UserError(f"{self.at(table, i, key)}: unknown key {key!r}; {hint}")

    def tables(self, data: Mapping, key: str) -> list[Mapping]:
        found = data.get(key, [])
        if not isinstance(found, list) or not all(isinstance(table, Mapping) for table in found):
            raise UserError(f"{self.at('', 0, key)}: write [[{key}]] with two brackets, one for each.")
        return found

    def string(self, data: Mapping, key: str, table: str, i: int) -> str | None:
        value = data.get(key)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.at(table, i, key)}: {key} must be a string; got {value!r}.")
        return value

    def strings(self, data: Mapping, key: str, table: str, i: int) -> list[str]:
        value = data.get(key, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{self.at(table, i, key)}: {key} must be a string or a list of strings.")
        return value

    def bounds(self, data: Mapping, table: str, i: int, origin: str) -> Bounds:
        names = {key: self.string(data, key, table, i) for key in ("type", "min", "max")}
        types = {key: name and tensor_type(name, self.at(table, i, key)) for key, name in names.items()}
        if types["type"] and (types["min"] or types["max"]):
            raise UserError(f"{self.at(table, i, 'type')}: give a type or bounds (min, max), not both.")
        if types["min"] and types["max"] and bits_per_weight(types["min"]) > bits_per_weight(types["max"]):
            raise UserError(
                f"{self.at(table, i, 'min')}: min {types['min']} is larger than max {types['max']}."
            )
        return Bounds(types["type"], types["min"], types["max"], origin)

    def rule(self, data: Mapping, i: int) -> ProfileRule:
        here = self.at("rule", i)
        self.check_keys(data, _RULE_KEYS, "rule", i)
        pattern = self.string(data, "match", "rule", i)
        if pattern is not None:
            check_pattern(pattern, self.at("rule", i, "match"))
        wanted = self.strings(data, "role", "rule", i)
        for role in wanted:
            if role not in ROLES:
                raise UserError(
                    f"{self.at('rule', i, 'role')}: unknown role {role!r}; roles: {', '.join(ROLES)}."
                )
        ranges = []
        for text in self.strings(data, "layers", "rule", i):
            try:
                ranges.append(parse_layers(text))
            except UserError as error:
                raise UserError(f"{self.at('rule', i, 'layers')}: {error}") from None
        bounds = self.bounds(data, "rule", i, here)
        if bounds[:3] == (None, None, None):
            raise UserError(f"{here}: the rule asks for nothing; give it a type, or min or max.")
        return ProfileRule(Selection(pattern, tuple(wanted), tuple(ranges)), bounds)

    def position(self, data: Mapping, i: int) -> WeightPosition:
        self.check_keys(data, _PROTECT_KEYS, "protect", i)
        values = []
        for key in _PROTECT_KEYS:
            value = data.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(
                    f"{self.at('protect', i, key)}: [[protect]] needs {key}, a number from 0; got {value!r}."
                )
            values.append(value)
        return WeightPosition(*values)

    def check_candidates(self, profile: Profile) -> None:
        """Some candidate must lie within the bounds, of the whole and of each rule."""
        if not profile.candidates:
            return
        for bounds in (profile.bounds, *(rule.bounds for rule in profile.rules)):
            if bounds.type is None and all(bounds.violation(type) for type in profile.candidates):
                bound = bounds.violation(profile.candidates[0])
                raise UserError(f"{self.where}: no candidate lies within the bounds ({bound}).")
