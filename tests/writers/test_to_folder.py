"""`jquant.to_folder` writes what `jquant quantize` writes, and names its arguments in mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.gguf_files import imatrix_file
from helpers.tables import rows
from helpers.tiny_models import LINES, write_tiny
from typer.testing import CliRunner

from jquant import Imatrix, load_samples, open_model, to_folder
from jquant.calibration import Texts
from jquant.core import OutputError, Progress, Reporter, UserError
from jquant.writers import QuantizedFolder
from jquant.writers.folder_plan import open_checkpoint
from jquant_cli.main import app

WIDE = {"hidden_size": 128, "intermediate_size": 128, "torch_dtype": "bfloat16"}
FEW = ("--samples", 6, "--sequence-length", 48)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM", **WIDE)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(LINES * 12))
    return file


@pytest.fixture(scope="module")
def importance(model, tmp_path_factory) -> Path:
    return imatrix_file(tmp_path_factory.mktemp("importance") / "imatrix.gguf", model, prefix="blk.")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Options of the command, and the arguments that say the same.
SAME = {
    "W8A8": (["-c", "{text}", *FEW], {"samples": "{text}"}),
    "FP8": ([], {}),
    "W4A16": (["--feedback", "-c", "{text}", *FEW], {"feedback": "{text}"}),
    "GPTQ": (["--imatrix", "{imatrix}", "--keep", "v_proj"], {"imatrix": "{imatrix}", "keep": "v_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("scheme", rows(SAME, {"FP8", "GPTQ"}))
def test_python_writes_the_bytes_of_the_command(scheme, model, text, importance, tmp_path):
    options, arguments = SAME[scheme]
    opened = open_model(model)
    files = {"{text}": text, "{imatrix}": importance}
    read = {"{text}": lambda: load_samples(opened, text, samples=6, sequence_length=48),
            "{imatrix}": lambda: Imatrix.read(importance)}  # fmt: skip
    said = ["quantize", model, tmp_path / "command", "--type", scheme.lower(), "--json", "-q", *options]
    done = CliRunner().invoke(app, [str(files.get(word, word)) for word in said])
    assert done.exit_code == 0, done.output
    given = {name: read[value]() if value in read else value for name, value in arguments.items()}
    made = to_folder(opened, str(tmp_path / "python"), scheme=scheme, **given)
    assert contents(tmp_path / "python") == contents(tmp_path / "command")
    told, report = json.loads(done.stdout), json.loads(json.dumps(made.report()))
    assert {key: report[key] for key in report if key != "files"} == {
        key: told[key] for key in told if key not in ("files", "model", "seconds", "peak_memory_bytes")
    }
    assert [Path(file["path"]).name for file in report["files"]] == [file.name for file in made.files]
    assert bool(made.fed_samples) == (scheme in ("W8A8", "W4A16"))


def test_any_way_to_name_a_model_makes_the_same_folder(model, tmp_path):
    ways = {"path": model, "text": str(model), "opened": open_model(model), "ours": open_checkpoint(model),
            "later": lambda: open_checkpoint(model)}  # fmt: skip
    for name, way in ways.items():
        to_folder(way, tmp_path / name, scheme="fp8")
    first, *rest = [contents(tmp_path / name) for name in ways]
    assert all(other == first for other in rest)


def test_without_an_output_the_plan_is_all_and_nothing_is_read(model, tmp_path):
    planned = to_folder(model, None, samples=Texts(("/absent",)), reporter=Reporter(note=print))
    assert isinstance(planned, QuantizedFolder)
    assert len(planned.plan.quantized) == 14
    assert "files" not in planned.report()
    assert planned.missed == ""


def test_a_reporter_hears_how_far_it_is_and_what_to_know(model, text, tmp_path):
    notes: list[str] = []
    events: list[Progress] = []
    to_folder(
        model,
        tmp_path / "out",
        scheme="W4A16",
        feedback=True,
        keep="q_proj",
        samples=Texts((str(text),), samples=6, sequence_length=48),
        reporter=Reporter(note=notes.append, progress=events.append),
    )
    assert events[0].task == "feedback"
    last = events[-1]
    assert (last.task, last.done) == ("write", last.of)
    to_folder(model, None, keep="none", reporter=Reporter(note=notes.append))
    assert not any("--" in note for note in notes)


MISTAKES = {
    "scheme": ({"scheme": "W8A9"}, r"scheme='W8A9': is none of W8A8, FP8, W4A16, GPTQ, AWQ\."),
    "alpha of floats": ({"scheme": "FP8", "alpha": 0.5}, "alpha=: is for W8A8, not FP8"),
    "alpha of none": ({"smooth": False, "alpha": 0.5}, "alpha=: does nothing with smooth=False"),
    "alpha": ({"alpha": 1.5}, r"alpha=1\.5: expected a number from 0 to 1"),
    "static": ({"scheme": "AWQ", "static_activations": True}, "static_activations=True: is for W8A8 and FP8"),
    "zeros": ({"scheme": "FP8", "asymmetric_activations": True}, "asymmetric_activations=True: is for W8A8"),
    "both": ({"asymmetric_activations": True, "static_activations": True}, "not static_activations=True"),
    "target": ({"smooth": False, "target_error": 0.1}, "target_error=: is for W8A8 that is smoothed"),
    "auto": ({"scheme": "FP8", "keep": "auto"}, "keep='auto': is for W8A8 that is smoothed"),
    "no pattern": ({"scheme": "FP8", "keep": "("}, r"keep='\(': not a regular expression"),
    "nothing": ({"scheme": "FP8", "keep": ["wo"]}, "keep='wo': matches none of the 14"),
    "analyze": ({"analyze": True}, "analyze=True: is measured anyway"),
    "imatrix": ({"imatrix": "absent.gguf"}, "imatrix=: is measured anyway"),
    "shards": ({"scheme": "FP8", "max_shard_size": "many"}, "max_shard_size='many': expected a size"),
    "batch": ({"scheme": "FP8", "batch": 0}, "batch=0: expected 1 or more"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_names_its_argument(arguments, said, model, tmp_path):
    with pytest.raises(UserError, match=said):
        to_folder(model, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_the_command_says_the_same_of_its_options(model, tmp_path):
    command = ["quantize", str(model), str(tmp_path / "out"), "--type", "FP8", "--keep", "wo"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3
    assert "jquant: --keep wo: matches none of the 14" in done.stderr


def test_what_is_there_is_replaced_only_where_that_is_asked_for(model, tmp_path):
    out = tmp_path / "out"
    to_folder(model, out, scheme="FP8")
    with pytest.raises(OutputError, match="out"):
        to_folder(model, out, scheme="AWQ")
    to_folder(model, out, scheme="AWQ", force=True)
    assert "awq" in (out / "config.json").read_text()
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    with pytest.raises(UserError, match="is quantized already"):
        to_folder(open_model(copy), tmp_path / "again")
