"""One table says which option of `jquant quantize` serves which output, and refusals come from it."""

from __future__ import annotations

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from jquant.checkpoints import schemes
from jquant.core import UserError
from jquant.writers._folder_options import read_options
from jquant_cli import _serves
from jquant_cli.main import app

OPTIONS = {one.name: one for one in get_command(app).commands["quantize"].params}  # pyright: ignore
OUTPUTS = {_serves.GGUF: "Q4_0", **{scheme: scheme for scheme in _serves.SCHEMES}}
FOLDER = {
    "samples": None, "alpha": None, "smooth": True, "static_activations": False, "keep": None,
    "asymmetric_activations": False, "imatrix": None, "analyze": False, "feedback": None,
    "target_error": None, "export_scales": None, "max_shard_size": None, "resume": False, "force": False,
    "batch": 4,
}  # fmt: skip


def refusal(*arguments: str) -> str:
    """What a command says that exits with 2, without the frame."""
    done = CliRunner().invoke(app, ["quantize", "absent", "out", *arguments], terminal_width=400)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


def given(name: str) -> list[str]:
    """The option with a value that it takes."""
    option = OPTIONS[name]
    word = max(option.opts, key=len)
    if option.is_flag:
        return [word]
    values = {"weighting": "outputs", "effort": "best", "max_shard_size": "1GB", "target_size": "1GB"}
    numbers = {"alpha": "0.5", "protection_coverage": "0.5"}
    return [word, {**values, **numbers}.get(name, "3")]


def test_every_option_of_the_command_has_its_row():
    assert set(_serves.TABLE) == set(OPTIONS)
    for name, use in _serves.TABLE.items():
        assert use.serves <= set(OUTPUTS), name
        assert {*use.needs, *use.excludes} <= {*OPTIONS, _serves.SMOOTHING}, name


def test_the_schemes_are_those_of_the_library():
    assert tuple(schemes.SCHEMES) == _serves.SCHEMES


@pytest.mark.parametrize("name", [name for name, use in _serves.TABLE.items() if len(use.serves) < 6])
def test_an_option_of_another_output_is_refused_by_name(name):
    for output in set(OUTPUTS) - _serves.TABLE[name].serves:
        said = refusal("--type", OUTPUTS[output], *given(name))
        assert f"{given(name)[0]}: is for " in said
        assert f"says nothing of {output}" in said


@pytest.mark.parametrize("name", [name for name, use in _serves.TABLE.items() if use.needs])
def test_an_option_that_does_nothing_alone_is_refused_with_what_it_needs(name):
    use = _serves.TABLE[name]
    for output in use.serves:
        alone = ["--no-smooth"] if output == "W8A8" else []
        said = refusal("--type", OUTPUTS[output], *alone, *given(name))
        assert f"{given(name)[0]}: does nothing with" in said
        useful = [other for other in use.needs if other in OPTIONS and other != "calibration"]
        for other in useful:
            assert (given(other)[0] in said) == (output in _serves.TABLE[other].serves), (output, other)


@pytest.mark.parametrize(
    ("name", "other"), [(name, other) for name, use in _serves.TABLE.items() for other in use.excludes]
)
def test_an_option_that_goes_with_no_other_is_refused_with_the_reason(name, other):
    use = _serves.TABLE[name]
    if other == _serves.SMOOTHING:
        beside = ["--type", "W8A8"]
    elif "W8A8" in use.serves & _serves.TABLE[other].serves:
        beside = ["--type", "W8A8", "--no-smooth", *given(other)]
    else:
        beside = given(other)
    said = refusal(*beside, *given(name))
    assert f"{given(name)[0]}: {use.excludes[other]}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "-t Q4_0 --samples 10 --search-seconds 5 --weights gradients -c /nope",
            "--weights: does nothing without --target-size, --target-bpw or --target-kld",
        ),
        ("-t Q4_0 --samples 10 -c /nope", "--calibration: does nothing without --analyze, --feedback"),
        ("-t Q4_0 -t Q8_0", "--type: is given more than once"),
        ("-t W8A8 --alpha 0.5 --alpha 0.6", "--alpha: is given more than once"),
        ("--feedback --no-feedback", "--feedback: is given more than once"),
        ("-t W8A8 --no-smooth --keep auto", "--keep: auto is for W8A8 that is smoothed"),
        ("-t FP8 --keep auto", "--keep: auto is for W8A8 that is smoothed"),
        ("-t Q4_0 --keep x", "see --rule"),
        ("-t W8A8 --rule x=F16", "see --keep"),
        ("--target-bpw 4 --weights usual --runtime x --samples 4", "--samples: does nothing without"),
        ("-t W4A16 --no-feedback --seed 0", "--seed: does nothing without --analyze or --feedback"),
        ("-t W8A8 --no-smooth --alpha 0", "--alpha: does nothing with --no-smooth"),
    ],
)  # fmt: skip
def test_wrong_command_lines_name_their_option(arguments, said):
    assert said in refusal(*arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "-t Q4_0 --samples 512 --search-seconds 0 --weights usual",  # as they are anyway
        "-t Q4_0 --no-feedback",
        "-t Q4_0 --rule a=F16 --rule b=F16 -q -q",
        "--protection-type Q8_0 --profile balanced",  # which may name super weights
        "--target-kld 0.1 -c text --samples 4",
        "--target-bpw 4 --search-seconds 9 --samples 4 --runtime llama.cpp-cuda",
        "-t W8A8 --samples 4 --batch 2 --keep none --no-feedback --target-error 0.1",
        "-t W8A8 --no-smooth --static-activations --samples 4 --imatrix x",
        "-t FP8 --static-activations --seed 0 --imatrix x",
        "-t AWQ --analyze --batch 1 --resume",
    ],
)
def test_command_lines_that_say_something_go_on_to_the_model(arguments):
    done = CliRunner().invoke(app, ["quantize", "absent-model", "out", *arguments.split()])
    assert done.exit_code == 3, done.output


@pytest.mark.parametrize(
    ("type", "said"),
    [
        ("INT8", "W8A8 for a folder, Q8_0 for a GGUF file"),
        ("W8A9", "did you mean W8A8"),
        ("Q4_KM", "Q4_K_M"),
        ("nonsense", "Of folders: W8A8, FP8, W4A16, GPTQ, AWQ."),
    ],
)
def test_an_unknown_type_says_what_may_be_meant(type, said):
    done = CliRunner().invoke(app, ["quantize", "absent", "out", "--type", type])
    assert done.exit_code == 3
    assert f"--type {type}: " in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("scheme", _serves.SCHEMES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", 0.5),
        ("no_smooth", True),
        ("static_activations", True),
        ("asymmetric_activations", True),
        ("target_error", 0.1),
    ],
)
def test_the_library_refuses_for_a_scheme_what_the_table_does(scheme, name, value):
    given = {"smooth": False} if name == "no_smooth" else {name: value}
    if scheme in _serves.TABLE[name].serves:
        read_options(None, scheme=scheme, **{**FOLDER, **given})
        return
    argument = "smooth=False" if name == "no_smooth" else f"{name}="
    with pytest.raises(UserError, match=argument):
        read_options(None, scheme=scheme, **{**FOLDER, **given})
