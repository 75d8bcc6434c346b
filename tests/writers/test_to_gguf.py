"""`to_gguf` beside the command: the same bytes from the same options, and mistakes that name the argument."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers.tiny_models import LINES, write_tiny
from typer.testing import CliRunner

from jquant.allocation import Target
from jquant.calibration import Texts, importance, load_samples
from jquant.checkpoints.model import open_model
from jquant.core import OutputError, Progress, Reporter, UserError
from jquant.io.imatrix import write_gguf
from jquant.writers import to_gguf
from jquant_cli import _errors
from jquant_cli.main import app

SHORT = {"samples": 4, "sequence_length": 32}
TEXT = ["-c", "text.txt", "--samples", 4, "--sequence-length", 32]
IMPORTANCE = ["--imatrix", "importance.gguf"]


def _every(*arguments: object):
    return pytest.param(*arguments, marks=pytest.mark.every)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and text.txt and importance.gguf beside it."""
    folder = tmp_path_factory.mktemp("front")
    write_tiny(folder / "model", "LlamaForCausalLM", hidden_size=256, intermediate_size=256)
    (folder / "text.txt").write_text("\n".join(LINES * 20))
    model = open_model(folder / "model")
    samples = load_samples(model, str(folder / "text.txt"), **SHORT)
    write_gguf(folder / "importance.gguf", importance(model, samples))
    return folder


@pytest.fixture
def texts(folder) -> Texts:
    return Texts([str(folder / "text.txt")], **SHORT)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"type": "Q4_0"}, ["--type", "Q4_0"]),
        ({"type": "Q8_0", "rules": ["attn_v=F16"], "max_shard_size": "500kB"},
         ["-t", "Q8_0", "--rule", "attn_v=F16", "--max-shard-size", "500kB"]),
        _every({"type": "IQ2_XXS", "imatrix": "importance.gguf"}, ["-t", "IQ2_XXS", *IMPORTANCE]),
        _every({"profile": "balanced", "output_type": "Q8_0"},
               ["--profile", "balanced", "--output-type", "Q8_0"]),
        _every({"type": "Q4_0", "feedback": True, "samples": ...}, ["-t", "Q4_0", "--feedback", *TEXT]),
        _every({"type": "Q4_0", "protect_super_weights": True, "balance_inputs": True, "samples": ...},
               ["-t", "Q4_0", "--protect-super-weights", "--balance-inputs", *TEXT]),
        _every({"target": Target(bpw=6), "analyze": True, "feedback": False, "samples": ...},
               ["--target-bpw", 6, "--analyze", "--no-feedback", *TEXT]),
        _every({"target": Target(nbytes=400_000), "sensitivity": "outputs", "samples": ...},
               ["--target-size", "400kB", "--weights", "outputs", *TEXT]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_python_writes_the_bytes_of_the_command(folder, texts, tmp_path, monkeypatch, arguments, options):
    monkeypatch.chdir(folder)
    if "samples" in arguments:
        arguments = arguments | {"samples": Texts(["text.txt"], **SHORT)}
    ours = to_gguf("model", tmp_path / "python.gguf", **arguments).paths
    command = ["quantize", "model", tmp_path / "command.gguf", "-q", *options]
    done = CliRunner().invoke(app, [*map(str, command)])
    assert done.exit_code == 0, done.output
    theirs = sorted(tmp_path.glob("command*.gguf"))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_without_a_place_the_plan_is_that_of_the_file(folder, tmp_path):
    model = open_model(folder / "model")
    planned = to_gguf(model, None, type="Q4_K_M")
    written = to_gguf(model, str(tmp_path / "out.gguf"), type="Q4_K_M")
    assert planned.plan == written.plan
    assert planned.paths == ()
    assert written.report()["files"] == [
        {"path": str(tmp_path / "out.gguf"), "bytes": (tmp_path / "out.gguf").stat().st_size}
    ]


def test_feedback_takes_samples_and_other_text_is_read_where_it_is_needed_only(folder, tmp_path):
    model = open_model(folder / "model")
    samples = load_samples(model, str(folder / "text.txt"), **SHORT)
    missing = Texts([str(folder / "missing.txt")])
    file = to_gguf(model, tmp_path / "out.gguf", type="Q4_0", feedback=samples, samples=missing)
    assert file.fed
    with pytest.raises(UserError, match=r"missing\.txt"):
        to_gguf(model, tmp_path / "other.gguf", type="Q4_0", feedback=True, samples=missing)


@dataclass
class Heard:
    notes: list[str] = field(default_factory=list)
    tasks: list[Progress] = field(default_factory=list)

    @property
    def reporter(self) -> Reporter:
        return Reporter(note=self.notes.append, progress=self.tasks.append)


def test_who_listens_hears_notes_and_how_far_each_task_is(folder, texts, tmp_path):
    heard = Heard()
    options = {"type": "Q2_K", "analyze": True, "samples": texts, "reporter": heard.reporter}
    to_gguf(folder / "model", tmp_path / "out.gguf", **options)
    assert any("feedback=False does without" in note for note in heard.notes)
    assert list(dict.fromkeys(event.task for event in heard.tasks)) == ["importance", "feedback", "write"]
    for task in ("importance", "feedback", "write"):
        *_, last = (event for event in heard.tasks if event.task == task)
        assert last.done == last.of > 0
    assert heard.tasks[0] == Progress("importance", 0, 0, tokens=4 * 32)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"type": "Q4_KM"}, "type=Q4_KM: .*Q4_K_M"),
        ({"type": "Q4_0", "target": Target(bpw=4)}, "target=: .*type="),
        ({"like": "other.gguf", "pure": True}, "like=: .*pure="),
        ({"analyze": True, "imatrix": "importance.gguf"}, "analyze=True: .*imatrix="),
        ({"output_type": "Q4_K_M"}, "output_type=Q4_K_M: "),
        ({"protection_type": "Q9"}, "protection_type=Q9: "),
        ({"protection_coverage": 2.0}, "protection_coverage=2.0: "),
        ({"runtime": "llama.cpp-cdua"}, "runtime=llama.cpp-cdua: .*llama.cpp-cuda"),
        ({"max_shard_size": "many"}, "max_shard_size=many: expected a size"),
        ({"threads": 0}, "threads=0: "),
        ({"batch": 0}, "batch=0: "),
        ({"search_seconds": -1.0}, "search_seconds=-1.0: "),
        ({"target": Target(kld=0.1), "search_seconds": 1.0, "samples": ...}, "search_seconds=: .*target="),
        ({"target": Target(bpw=1)}, "nearest possible target is bpw="),
        ({"target": Target(nbytes=10_000)}, "nearest possible target is nbytes="),
        ({"target": Target(bpw=6), "sensitivity": {"output.weight": 1.0}}, "sensitivity=: has no number"),
        ({"rules": ["attn_v"]}, "rule 'attn_v': expected regex=TYPE"),
        ({"type": "IQ2_XXS"}, "imatrix=FILE"),
        ({"profile": "balnced"}, "profile 'balnced': .*balanced"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_argument(folder, texts, tmp_path, arguments, says):
    arguments = arguments | ({"samples": texts} if "samples" in arguments else {})
    with pytest.raises(UserError, match=says) as caught:
        to_gguf(folder / "model", tmp_path / "out.gguf", **arguments)
    assert "--" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_mistake_shows_before_the_model_is_opened(tmp_path):
    def opened():
        raise AssertionError

    with pytest.raises(UserError, match="runtime="):
        to_gguf(opened, tmp_path / "out.gguf", runtime="none")
    (tmp_path / "out.gguf").touch()
    with pytest.raises(OutputError, match="force=True"):
        to_gguf(opened, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "given", [{}, {"bpw": 4, "kld": 0.1}, {"bpw": 0}, {"nbytes": -1}, {"kld": float("nan")}]
)
def test_a_target_is_one_number_above_zero(given):
    with pytest.raises(ValueError, match="="):
        Target(**given)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("exists; give force=True to replace it.", "exists; give --force to replace it."),
        ("pass imatrix=FILE, or a larger type.", "pass --imatrix FILE, or a larger type."),
        ("search_seconds=: needs a size.", "--search-seconds: needs a size."),
        ("leave effort='best', or feedback=, away.", "leave --effort best, or --feedback, away."),
        ("add rules=['^a\\.b$=Q4_K'].", "add --rule '^a\\.b$=Q4_K'."),
        ("the nearest is nbytes=12 (12 B).", "the nearest is --target-size 12 (12 B)."),
        ("keep=…, out=None, feedback=False", "--keep, --dry-run, --no-feedback"),
        ("allow_fallback=False forbids it", "--no-fallback forbids it"),
        ("rule 'attn_v=Q8_0' in --mesh data=2,model=1", "rule 'attn_v=Q8_0' in --mesh data=2,model=1"),
    ],
)  # fmt: skip
def test_the_command_line_adds_the_dashes(message, said):
    assert _errors.as_options(message) == said
