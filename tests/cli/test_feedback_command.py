"""`jquant quantize` with error feedback and tuning: when it does so, what it says, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_models import write_tiny
from typer.testing import CliRunner

from jquant_cli import _progress
from jquant_cli.main import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and text.txt beside it."""
    folder = tmp_path_factory.mktemp("command")
    # ffn_down is wide enough for two bits a weight, and the rest is small.
    write_tiny(folder / "model", "LlamaForCausalLM", intermediate_size=256)
    write_tiny(folder / "mixtral", "MixtralForCausalLM", intermediate_size=256)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return folder


def quantize(folder: Path, out: Path, *options: str, model: str = "model", code: int = 0):
    reads = {"--analyze", "--feedback"} & {*options}
    text = ["-c", str(folder / "text.txt"), "--samples", "9", "--sequence-length", "32"] if reads else []
    command = ["quantize", str(folder / model), str(out), *text, "--json", *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == code, done.output
    return done


@pytest.mark.parametrize(
    ("options", "fed"),
    [
        (["--analyze", "--type", "TQ2_0"], True),
        (["--analyze", "--type", "TQ2_0", "--no-feedback"], False),
        (["--analyze", "--type", "Q4_0"], False),
        (["--feedback", "--type", "Q4_0"], True),
        (["--type", "TQ2_0"], False),
    ],
)
def test_feedback_is_the_default_where_text_is_read_and_bits_are_few(tmp_path, folder, options, fed):
    done = quantize(folder, tmp_path / "out.gguf", *options)
    report = json.loads(done.stdout)
    assert ("feedback" in report) == fed
    assert ("--no-feedback" in done.stderr) == (fed and "--feedback" not in options)
    before, _, after = done.stderr.partition("error feedback: about ")
    assert bool(after) == fed
    assert before.count("block 1 of 2") == ("--analyze" in options)  # what it will take is said first
    assert "tuning" not in report


def test_the_best_effort_tunes_and_says_what_it_gained(tmp_path, folder):
    done = quantize(folder, tmp_path / "out.gguf", "--feedback", "--effort", "best", "--type", "TQ2_0")
    gain = json.loads(done.stdout)["tuning"]
    assert 0 < gain["after"] <= gain["before"]
    assert "step 2 of 2" in done.stderr  # 9 samples, of which 2 are set aside, 4 a step, in 2 epochs
    assert f"{gain['before']:.4f}" in done.stderr


def test_experts_that_saw_too_little_are_named(tmp_path, folder):
    done = quantize(folder, tmp_path / "out.gguf", "--feedback", "--type", "TQ2_0", model="mixtral")
    starved = json.loads(done.stdout)["starved_experts"]
    assert starved  # 288 tokens, two of four experts each, of matrices with 256 columns
    assert any(f"{name}: {experts}" in done.stderr for name, experts in starved.items())


def test_a_text_that_is_not_there_is_said_before_anything_is_written(tmp_path, folder):
    command = ["quantize", str(folder / "model"), str(tmp_path / "out.gguf"), "--feedback", "-c"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "absent.txt")])
    assert done.exit_code == 3
    assert "absent.txt" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_time_left_counts_from_where_feedback_ended(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(_progress._show, "remark", said.append)
    bar = _progress.ProgressBar(100, shown=True)
    now[0] = 5000.0
    bar("", 80)  # written by error feedback
    now[0] += 2 * _progress.LOG_SECONDS
    bar("token_embd.weight", 10)
    assert f" {2 * _progress.LOG_SECONDS:.0f} s left" in said[0]
