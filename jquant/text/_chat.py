"""Messages as the model was trained to see them: its chat template, rendered."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from jquant.core import UserError
from jquant.text.token_ids import TokenIds

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(messages: list, tokenizer: TokenIds, template: str | None, where: str) -> str:
    """The text of a chat. Raises UserError, which begins with `where`, where the template refuses it."""
    if template is None:
        raise UserError(f"{where}: has messages, but the model has no chat template; give lines of text.")
    import jinja2

    special = {f"{kind}_token": text for kind, text in tokenizer.special_texts.items()}
    try:
        compiled = _environment().from_string(template)
        return compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=False, **special
        )
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses it: {error}.") from None
    except Exception as error:  # a template is a program, made for messages of another form
        raise UserError(
            f"{where}: the model's chat template fails on it ({type(error).__name__}: {error}); give every "
            "message a text as its content, or delete the line."
        ) from None


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives templates (chat_template_utils, _compile_jinja_template): loop controls, the
    tag {% generation %}, `tojson` that escapes nothing, raise_exception, strftime_now. A sandbox, for a
    template is a program of whoever published the model."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}…{% endgeneration %} marks what the assistant says; the text is what is inside."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    added: dict[str, Callable] = {"raise_exception": refuse, "strftime_now": _strftime_now}
    environment.globals.update(added)
    return environment


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
