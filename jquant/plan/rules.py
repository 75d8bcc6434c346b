"""Rules that a user writes, `regex=TYPE`: this type for every tensor whose name the regex is found in.

The file form is llama-quantize's tensor-type file: rules separated by white space.
"""

from __future__ import annotations

import difflib
import re
import warnings
from dataclasses import dataclass

from jquant.core import GGML_TYPES, UserError
from jquant.plan.file_types import ALIASES, FILE_TYPES

# ggml types that hold no weights: indices, float64, and the activations' side of ggml's products.
_NOT_FOR_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
TENSOR_TYPES = tuple(name for name in GGML_TYPES if name not in _NOT_FOR_WEIGHTS)


@dataclass(frozen=True)
class Rule:
    """`pattern` is searched in the tensor name, letter case aside; of several rules the first match wins."""

    pattern: str
    type: str

    def __post_init__(self) -> None:
        check_pattern(self.pattern, f"rule '{self}'")
        object.__setattr__(self, "type", tensor_type(self.type, f"rule '{self}'"))

    def matches(self, name: str) -> bool:
        return re.search(self.pattern, name, re.IGNORECASE) is not None

    def __str__(self) -> str:
        return f"{self.pattern}={self.type}"


def check_pattern(pattern: str, where: str) -> None:
    """Raises UserError, which starts with `where`, where it is no regular expression."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what a later Python may read otherwise
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{where}: {error} in {pattern!r}.") from None


def tensor_type(name: str, where: str) -> str:
    """The ggml type of this name (any case) that can hold weights; UserError, which starts with `where`."""
    key = name.strip().upper()
    if key in TENSOR_TYPES:
        return key
    if key in FILE_TYPES or key in ALIASES:
        base = FILE_TYPES[ALIASES.get(key, key)].base
        raise UserError(f"{where}: {name} is the type of a whole file; a tensor has a type such as {base}.")
    close = difflib.get_close_matches(key, TENSOR_TYPES, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"choose one of {', '.join(TENSOR_TYPES)}."
    raise UserError(f"{where}: unknown tensor type {name!r}; {hint}")


def parse_rule(text: str) -> Rule:
    """'attn_v=Q8_0' → Rule. The last '=' divides, so a regex may hold others."""
    pattern, equals, type = text.strip().rpartition("=")
    if not equals or not pattern or not type:
        raise UserError(f"rule {text!r}: expected regex=TYPE, e.g. 'attn_v=Q8_0'.")
    return Rule(pattern, type)


def parse_rules_file(text: str, where: str) -> tuple[Rule, ...]:
    """The rules of a file, in order. where: the file's name for errors, which add the line."""
    rules = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word in line.split():
            try:
                rules.append(parse_rule(word))
            except UserError as error:
                raise UserError(f"{where}, line {number}: {error}") from None
    return tuple(rules)
