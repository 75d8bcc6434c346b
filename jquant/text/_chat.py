"""Messages as the model was trained to see them: its chat template, rendered."""

from __future__ import annotations

from jquant.core import UserError
from jquant.text.token_ids import TokenIds


def render(messages: list, tokenizer: TokenIds, template: str | None, where: str) -> str:
    """The text of a chat. Raises UserError, which begins with `where`, where the template refuses it."""
    if template is None:
        raise UserError(f"{where}: has messages, but the model has no chat template; give lines of text.")
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    special = {
        f"{kind}_token": "" if token is None else tokenizer.text_of[token]
        for kind, token in (("bos", tokenizer.bos), ("eos", tokenizer.eos))
    }
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=False, **special)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses it: {error}.") from None
    except Exception as error:  # a template is a program, made for messages of another form
        raise UserError(
            f"{where}: the model's chat template fails on it ({type(error).__name__}: {error}); give every "
            "message a text as its content, or delete the line."
        ) from None
