"""`jquant profile list|show|create|validate`: profiles, the TOML files that `quantize --profile` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _errors, _options, _show

app = typer.Typer(
    help="Which types a profile allows each tensor: presets, and files of your own.", no_args_is_help=True
)

_Name = Annotated[str, typer.Argument(help="A preset (see list) or a TOML file.")]


@app.command("list", epilog=_errors.EXIT_CODES)
@_errors.one_line_errors
def list_presets(json: _options.Json = False) -> None:
    """Show the presets."""
    from jquant.core.human import text_table
    from jquant.plan import preset_names, read_profile

    found = [read_profile(name) for name in preset_names()]
    if json:
        _show.result_json([{"name": p.name, "file_type": p.file_type, "about": p.about} for p in found])
    else:
        rows = [(p.name, p.file_type or "", p.about) for p in found]
        _show.result(text_table(("profile", "file type", "what it is"), rows))


@app.command("show", epilog=_errors.EXIT_CODES)
@_errors.one_line_errors
def show(name: _Name) -> None:
    """Print a profile's TOML: the start of one of your own."""
    from jquant.plan import parse_profile, profile_text

    text = profile_text(name)
    parse_profile(text, name)
    _show.result(text.rstrip("\n"))


@app.command("create", epilog=_errors.EXIT_CODES)
@_errors.one_line_errors
def create(
    out: Annotated[Path, typer.Argument(help="TOML file to write.")],
    base: Annotated[str, typer.Option("--from", help="Preset or TOML file to start from.")] = "balanced",
    force: _options.Force = False,
) -> None:
    """Write a profile to edit, a copy of a preset."""
    from jquant.io import check_target
    from jquant.plan import parse_profile, profile_text

    text = profile_text(base)
    parse_profile(text, base)
    check_target(out, force=force)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    _show.result(f"{out}: a copy of {base}; use it with jquant quantize --profile {out}")


@app.command("validate", epilog=_errors.EXIT_CODES)
@_errors.one_line_errors
def validate(
    name: _Name,
    model: Annotated[
        Path | None, typer.Option("--model", help="Check too that every rule selects tensors of this model.")
    ] = None,
    json: _options.Json = False,
) -> None:
    """Check a profile, and with --model show what it allows each tensor."""
    from jquant.core.human import text_table
    from jquant.plan import read_profile

    profile = read_profile(name)
    rows = []
    if model is not None:
        from jquant.checkpoints.model import open_model
        from jquant.plan import settle

        opened = open_model(model)
        found = settle(opened.source.specs, opened.metadata, profile=profile, has_imatrix=True)
        rows = [
            {
                "tensor": tensor,
                "type": bounds.type,
                "min": bounds.minimum,
                "max": bounds.maximum,
                "origin": bounds.origin,
            }
            for tensor, bounds in found.bounds.items()
        ]
    if json:
        _show.result_json({"profile": profile.name, "rules": len(profile.rules), "tensors": rows})
        return
    if rows:
        keys = ("tensor", "type", "min", "max", "origin")
        _show.result(text_table(keys, [[str(row[key] or "") for key in keys] for row in rows]) + "\n")
    _show.result(f"{profile.name}: sound; {len(profile.rules)} rules, {len(profile.protect)} super weights")
