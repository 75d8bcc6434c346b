"""Which tensors a rule of a profile is about: by regex, by role, by layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jquant.core import UserError
from jquant.models import matrix
from jquant.plan.mixtures import layer
from jquant.plan.mixtures import role as mixture_role

ROLES = ("attention", "mlp", "expert", "embedding", "output")


def roles(name: str, *, is_tied: bool) -> frozenset[str]:
    """The roles of a tensor. Token embeddings that serve as the output too have both roles."""
    what = mixture_role(name)
    if what == "output":
        return frozenset({"output"})
    if what == "token_embd":
        return frozenset({"embedding", "output"} if is_tied else {"embedding"})
    if part := re.fullmatch(r"blk\.\d+\.(.+)\.(weight|bias)", name):
        row = matrix(part[1])
        if row is not None:
            return frozenset({row.role})
    # Of an architecture whose blocks are not known here, GGUF's names tell it.
    if "_exps." in name:
        return frozenset({"expert"})
    part = re.match(r"blk\.\d+\.(attn|ffn)", name)
    return frozenset({{"attn": "attention", "ffn": "mlp"}[part[1]]}) if part else frozenset()


@dataclass(frozen=True)
class Layers:
    """Layers `start` to `stop`, both included: numbers from 0, or shares of the depth in percent.

    A number below 0 counts from the last layer, which is −1.
    """

    start: int
    stop: int
    is_share: bool
    text: str

    def holds(self, i: int, count: int) -> bool:
        """Whether layer i of `count` is among them; of shares, whether its middle is."""
        if self.is_share:
            return self.start <= 100 * (i + 0.5) / count < self.stop
        start, stop = (n + count if n < 0 else n for n in (self.start, self.stop))
        return start <= i <= stop


_RANGE = re.compile(r"(\d+)(%?)(?:\s*-\s*(\d+)(%?))?")
_END = re.compile(r"(first|last)\s+(\d+)(%?)")


def parse_layers(text: str) -> Layers:
    """'first 2', 'last 10%', '0-3', '7', '25%-50%'. Raises UserError, which names what was found."""
    if end := _END.fullmatch(text.strip()):
        n = int(end[2])
        if n == 0 or (end[3] and n > 100):
            raise UserError(f"layers {text!r}: {'at most 100%' if n else 'none'}; give a number from 1.")
        if end[3]:
            return Layers(*((0, n) if end[1] == "first" else (100 - n, 100)), True, text)
        return Layers(*((0, n - 1) if end[1] == "first" else (-n, -1)), False, text)
    found = _RANGE.fullmatch(text.strip())
    if not found or (found[3] is not None and found[2] != found[4]) or (found[2] and found[3] is None):
        raise UserError(f"layers {text!r}: expected 'first 2', 'last 10%', '0-3', '7' or '25%-50%'.")
    start, stop = int(found[1]), int(found[3] or found[1])
    if stop < start or (found[2] and not start < stop <= 100):
        raise UserError(f"layers {text!r}: the range ends before it begins, or beyond 100%.")
    return Layers(start, stop, bool(found[2]), text)


@dataclass(frozen=True)
class Selection:
    """Tensors for which all that is given holds. Nothing given: all tensors."""

    pattern: str | None = None  # searched in the name, letter case aside
    roles: tuple[str, ...] = ()  # one of these
    layers: tuple[Layers, ...] = ()  # in one of these; tensors outside the layers never are

    def holds(self, name: str, count: int, *, is_tied: bool) -> bool:
        """count: layers of the model. is_tied: it has no output matrix of its own."""
        if self.pattern is not None and not re.search(self.pattern, name, re.IGNORECASE):
            return False
        if self.roles and not roles(name, is_tied=is_tied) & set(self.roles):
            return False
        i = layer(name)
        return not self.layers or (i >= 0 and any(part.holds(i, count) for part in self.layers))

    def __str__(self) -> str:
        parts = [] if self.pattern is None else [f"'{self.pattern}'"]
        parts += ["/".join(self.roles)] if self.roles else []
        parts += [f"layers {', '.join(part.text for part in self.layers)}"] if self.layers else []
        return " in ".join(parts) or "all tensors"
