"""A run that measures, searches and feeds back before it writes is killed, and goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import LINES, write_tiny
from typer.testing import CliRunner

from jquant.core import OutputError, UserError
from jquant.io.findings import Findings
from jquant.ldlq import sequential
from jquant.smoothquant import _search as smooth_search
from jquant.smoothquant import smoothing
from jquant_cli.main import app

WIDE = {"hidden_size": 128, "intermediate_size": 128, "torch_dtype": "bfloat16"}
SOME = {"a|b": np.arange(3, dtype=np.float64) / 3}
STEPS = ["measured-0", "searched-0", "searched-1", "fed-0", "fed-1"]  # of a model of two blocks


class Killed(BaseException):
    """What nothing catches."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM", **WIDE)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(LINES * 12))
    return file


def run(model: Path, out: Path, text: Path, *options: object, code: int = 0) -> str:
    measured = ["-c", text, "--samples", 6, "--sequence-length", 48, "--feedback", "--json"]
    arguments = ["quantize", model, out, "--type", "W8A8", "-q", *measured, *options]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(result.exception, Killed):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def undisturbed(model, text, tmp_path_factory) -> tuple[dict[str, bytes], dict]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    report = json.loads(run(model, out, text))
    return {file.name: file.read_bytes() for file in out.iterdir()}, report


@pytest.mark.parametrize("known", [2, 4])
def test_a_killed_run_goes_on_to_the_same_folder_and_report(
    known, model, text, undisturbed, tmp_path, monkeypatch
):
    remembered: list[str] = []
    remember = Findings.remember

    def kill(self, step, block, arrays):
        remember(self, step, block, arrays)
        remembered.append(f"{step}-{block}")
        if len(remembered) == known:
            raise Killed

    monkeypatch.setattr(Findings, "remember", kill)
    with pytest.raises(Killed):
        run(model, tmp_path / "out", text)
    assert remembered == STEPS[:known]
    assert not (tmp_path / "out").exists()
    refused = run(model, tmp_path / "out", text, "--resume", "--keep", "none", code=4)
    assert "was begun from another model, from other text or with other settings" in refused

    again: list[str] = []

    def counted(step, function):
        def call(*arguments, **options):
            again.append(step)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(Findings, "remember", remember)
    monkeypatch.setattr(smoothing, "measure", counted("measured", smoothing.measure))
    monkeypatch.setattr(smooth_search, "search_block", counted("searched", smooth_search.search_block))
    monkeypatch.setattr(sequential.Fitter, "quantize", counted("fed", sequential.Fitter.quantize))
    report = json.loads(run(model, tmp_path / "out", text, "--resume"))
    assert again == [step.split("-")[0] for step in STEPS[known:]]
    files, whole = undisturbed
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == files
    assert report["smoothing"] == whole["smoothing"]
    assert report["tensors"] == whole["tensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def use(findings: Findings, ends: BaseException, *blocks: int) -> list[dict[str, np.ndarray] | None]:
    """What is known of these blocks; then it is known, and the run ends so."""
    with findings:
        before = [findings.recall("fed", block) for block in blocks]
        for block in blocks:
            findings.remember("fed", block, SOME)
        ends.args = (before,)
        raise ends


def test_without_resume_nothing_is_recalled_and_a_mistake_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed) as ended:
        use(Findings(out, "print", resume=True), Killed(), 0)
    assert ended.value.args == ([None],)
    with pytest.raises(OutputError) as ended:  # such as a full disk
        use(Findings(out, "print", resume=True), OutputError(), 0, 1)
    ((known, new),) = ended.value.args
    np.testing.assert_equal(known, SOME)
    assert new is None
    with pytest.raises(UserError) as ended:
        use(Findings(out, "other", resume=False), UserError(), 0)
    assert ended.value.args == ([None],)
    assert not list(tmp_path.iterdir())
    with pytest.raises(Killed):
        use(Findings(out, "print", resume=False), Killed())
    assert not list(tmp_path.iterdir())


def test_two_runs_of_one_output_are_refused(tmp_path):
    with (
        Findings(tmp_path / "out", "print", resume=True),
        pytest.raises(OutputError, match="another run is writing this output"),
    ):
        Findings(tmp_path / "out", "print", resume=True)


def test_a_damaged_or_foreign_folder_is_said(tmp_path):
    out, beside = tmp_path / "out", tmp_path / "out.partial.findings"
    with pytest.raises(Killed):
        use(Findings(out, "print", resume=False), Killed(), 0)
    (beside / "fed-00000.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"fed-00000\.npz: is damaged; delete the folder and start anew"):
        use(Findings(out, "print", resume=True), Killed(), 0)
    beside.mkdir()
    (beside / "diary.txt").write_text("dear")
    with pytest.raises(OutputError, match="in the way and none of ours"):
        Findings(out, "print", resume=False)
    assert (beside / "diary.txt").read_text() == "dear"
